"""The dtype that a model has at a target, and the dtypes of the tensors that are delivered for it.

The engine reads the dtype of the model from config.json and casts plain tensors to it. Its modes don't take every dtype
(`engine/linear_mode.py: LinearMode.dtypes`), so the dtype decides which of them a module may have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.engine.linear_mode import MODEL_DTYPES
from trtllm_ct.engine.model_classes import BFLOAT16_CLASSES
from trtllm_ct.plan.deliver import Dtypes

if TYPE_CHECKING:
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.models.sites import Model

__all__ = ["dtype_warnings", "dtypes_of"]


def dtypes_of(model: Model, target: Target, dtype: DType | None) -> Dtypes:
    """Return the dtypes of delivered tensors, for the requested dtype of dequantized modules or the model's.

    At a target for plain weights the requested dtype is the model's as well. In a directory with a file for each rank,
    all plain tensors have one dtype. An engine computes the whole model in one of `MODEL_DTYPES`: the requested one, or
    else that of config.json, or else bfloat16; some of its classes compute in bfloat16 only. Any other target keeps the
    model's dtype, except that float16 applies to all of it. Plain tensors are cast to float16 only: engines cast all
    others while they load them.
    """
    requested = dtype or model.dtype
    if target.ranks:
        return Dtypes(model=requested, dequantized=requested, cast_plain=True)
    if target.capabilities.release is not None:
        computed = _computed_in(model, requested)
        # Dequantized modules keep a requested float32, which the engine rounds once.
        dequantized = dtype if dtype not in (None, *MODEL_DTYPES) else computed
        return Dtypes(model=computed, dequantized=dequantized or computed, cast_plain=computed is DType.F16)
    cast_plain = requested is DType.F16
    whole_model = cast_plain or not target.holds_codes
    return Dtypes(model=requested if whole_model else model.dtype, dequantized=requested, cast_plain=cast_plain)


def _computed_in(model: Model, requested: DType) -> DType:
    """Return the dtype in which an engine computes a model."""
    if model.name in BFLOAT16_CLASSES:
        return DType.BF16
    return next((dtype for dtype in (requested, model.dtype) if dtype in MODEL_DTYPES), DType.BF16)


def dtype_warnings(model: Model, target: Target, dtype: DType | None) -> tuple[str, ...]:
    """Return a warning if an engine doesn't compute in the requested dtype or the model's own."""
    asked = dtype if dtype in MODEL_DTYPES else model.dtype
    computed = dtypes_of(model, target, dtype).model
    if target.capabilities.release is None or computed is asked:
        return ()
    reason = (
        f"{model.name} of the engine computes in bfloat16 whatever config.json says"
        if model.name in BFLOAT16_CLASSES
        else f"config.json says {model.dtype.torch_name}, and the engine has kernels for bfloat16 and float16 only"
    )
    return (f"dtype of the model: {reason}, so the model is delivered as {computed.torch_name}",)
