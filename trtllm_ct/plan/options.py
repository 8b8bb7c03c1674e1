"""`PlanOptions`: what a plan is made for and what was asked of it, as one value for all stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from trtllm_ct.base.arguments import FLAG, Check, check_arguments, instance_of, whole_number
from trtllm_ct.base.dtypes import DENSE_DTYPES, DType
from trtllm_ct.base.errors import Fault, FaultCollector, UsageError
from trtllm_ct.base.json_form import fields_form, from_fields
from trtllm_ct.engine.parallel import ONE_RANK, Parallel
from trtllm_ct.engine.releases import DEFAULT_ENGINE, KV_CACHE_WORDS
from trtllm_ct.engine.requantization import NOT_REQUANTIZED, Requantize
from trtllm_ct.engine.target import MODELOPT, Target, target_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from typing_extensions import Self, Unpack

__all__ = ["PARALLEL", "PlanArguments", "PlanOptions", "dense_dtype"]


class PlanArguments(TypedDict, total=False):
    """The options of `PlanOptions` as keyword arguments of functions; its docstring says what they mean."""

    engine: str
    sm: int | None
    untested: bool
    additive_zeros: bool
    dtype: str | DType | None
    strict: bool
    parallel: Parallel
    dense_o_proj: bool
    requantize: str | Iterable[str] | Mapping[str, str] | Requantize | None
    kv_cache: str | None


PARALLEL = instance_of(
    "the sizes as Parallel(tensor=2), of trtllm_ct.engine.parallel", Parallel, remedy="Leave it out for one rank."
)
"""What `parallel` has to be, wherever it is an argument."""

_CHECKS: Mapping[str, Check] = {
    "to": instance_of("the name of a target, such as modelopt", str, remedy="Name a target of trtllm_ct.TARGETS."),
    "engine": instance_of(
        "a release as text, such as '1.2.1'", str, remedy=f"Write it in quotes, or leave it out for {DEFAULT_ENGINE}."
    ),
    "sm": whole_number("the SM of a GPU as a number, such as 90").or_none(),
    "untested": FLAG,
    "additive_zeros": FLAG,
    "dtype": instance_of("a dtype of trtllm_ct.base.dtypes", DType).or_none(),
    "strict": FLAG,
    "parallel": PARALLEL,
    "dense_o_proj": FLAG,
    "requantize": instance_of("a Requantize, or with PlanOptions.of words such as experts=nvfp4", Requantize),
    "kv_cache": Check(
        f"{' or '.join(KV_CACHE_WORDS)}, or None",
        lambda mode: mode is None or mode in KV_CACHE_WORDS,
        "Name the mode that kv_cache_config of the engine will have, or leave it out.",
    ),
}
"""What each option has to be; whether there is such a target, release or SM is what `PlanOptions.target` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Everything that decides a plan beside the checkpoint.

    Attributes:
        to: Name of the target.
        engine: Release line of TensorRT-LLM that the plan is made for, or a version such as 1.2.1.
        sm: SM of the GPUs that the engine will run on; None plans for what all of them have in common, and
            for modes that only some of them have where no other holds a weight (`Plan.gpus`).
        untested: For target `engine` only: put integer codes into the order of the kernel, see `target_named`.
        additive_zeros: For target `tensorrt_llm` only: this package's Linear for zero points can be installed.
        dtype: Dtype of dequantized modules, None that of the model; it may change the model's too (`model_dtype.py`).
        strict: Whether it is a fault when a module has to be dequantized because the target has no mode for it, and
            when the engine can't serve the result (`Plan.problems`). Modules that `dense_o_proj` dequantizes are none.
        parallel: The sizes that the engine will run with: a mode must hold every rank's slice.
        dense_o_proj: Dequantize the output projections of attention whose input attention would quantize at a fixed
            scale; that depends on the KV cache.
        requantize: Which modules that would be dequantized are rounded to codes instead, or keep their own with static
            scales of inputs, and these scales.
        kv_cache: Mode of the KV cache that the engine will be told, such as `FP8`; None means the one that the
            checkpoint asks for.

    Raises `UsageError` with all options that are of a wrong type.
    """

    to: str = MODELOPT.name
    engine: str = DEFAULT_ENGINE
    sm: int | None = None
    untested: bool = False
    additive_zeros: bool = True
    dtype: DType | None = None
    strict: bool = False
    parallel: Parallel = ONE_RANK
    dense_o_proj: bool = False
    requantize: Requantize = NOT_REQUANTIZED
    kv_cache: str | None = None

    def __post_init__(self) -> None:
        check_arguments(_CHECKS, {name: getattr(self, name) for name in _CHECKS})

    @classmethod
    def of(cls, to: str, **asked: Unpack[PlanArguments]) -> Self:
        """Return the options for a target, given as keyword arguments.

        `dtype` may be a name, see `dense_dtype`, and `requantize` text such as `experts=nvfp4`, see `Requantize.parse`.
        Raises `UsageError` for options that are unknown or of a wrong type.
        """
        _refuse_unknown(asked)
        parsed = {"dtype": dense_dtype(asked.get("dtype")), "requantize": Requantize.parse(asked.get("requantize"))}
        return cls(to=to, **{**asked, **parsed})  # type: ignore[arg-type]

    def target(self) -> Target:
        """Return the target with the capabilities of the release and the GPUs.

        Raises `UsageError` for an unknown name, release or SM.
        """
        return target_named(
            self.to, self.engine, sm=self.sm, additive_zeros=self.additive_zeros, untested=self.untested
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return fields_form(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Self:
        """Return the options of which `entry` is the JSON form."""
        return from_fields(
            cls,
            entry,
            parallel=lambda sizes: from_fields(Parallel, sizes),
            dtype=DType.from_torch,
            requantize=Requantize.from_dict,
        )


def _refuse_unknown(asked: Iterable[str]) -> None:
    """Raise `UsageError` for keywords that are no options of planning."""
    faults = FaultCollector()
    options = PlanArguments.__annotations__
    for name in asked:
        if name not in options:
            faults.add(
                where=name,
                expected=f"an argument of the function, or an option of planning: {', '.join(options)}",
                found="an unknown keyword",
                remedy="Correct its name. Parallel sizes are one option: parallel=Parallel(tensor=2, pipeline=1).",
            )
    faults.raise_if_any(UsageError)


def dense_dtype(dtype: str | DType | None) -> DType | None:
    """Return the dtype of dequantized modules that was asked for; None for `auto`, that of the model.

    Raises `UsageError` for an unknown name.
    """
    if dtype is None or isinstance(dtype, DType):
        return dtype
    # Torch's dtypes have their name behind a dot.
    name = str(dtype).removeprefix("torch.")
    if name not in DENSE_DTYPES:
        raise UsageError(
            Fault(where="dtype", expected=" or ".join(DENSE_DTYPES), found=repr(name), remedy="Choose one of these.")
        )
    return None if name == DENSE_DTYPES[0] else DType.from_torch(name)
