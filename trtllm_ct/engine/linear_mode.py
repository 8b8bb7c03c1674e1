"""What an entry of the table of modes says: `LinearMode`, with the kinds of scales and activations.

The table itself is `LINEAR_MODES` in `engine/modes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import auto
from math import lcm
from typing import TYPE_CHECKING

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import Element, Packing, QuantAlgo, Strategy
from trtllm_ct.base.str_enum import StrEnum

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.engine.releases import Release

__all__ = ["MODEL_DTYPES", "Activations", "LinearMode", "ScaleForm"]

MODEL_DTYPES = frozenset({DType.BF16, DType.F16})
"""The dtypes in which the PyTorch backend computes a model, whatever its modes.

Its norms call flashinfer, which has no float32 kernel: `_torch/modules/rms_norm.py: RMSNorm.forward` (0419019a) ends in
"failed to dispatch data type Float" (issue 5260 of TensorRT-LLM).
"""


class ScaleForm(StrEnum):
    """How a Linear reads its scales."""

    SCALAR = auto()
    """`weight_scale` float32 []"""
    ROW = auto()
    """`weight_scale` float32 [N]"""
    GROUP = auto()
    """`weight_scale` float32 [N, K / group_size]"""
    BLOCK = auto()
    """`weight_scale` float32 [ceil(N / 128), ceil(K / 128)]"""
    TWO_LEVEL = auto()
    """`weight_scale` e4m3 [N, K / 16] and `weight_scale_2` float32 []"""
    EXPONENT = auto()
    """`weight_scale` uint8 (E8M0) [N, K / 32]"""

    @property
    def dtype(self) -> DType:
        """The dtype of `weight_scale`."""
        return {ScaleForm.TWO_LEVEL: DType.F8_E4M3, ScaleForm.EXPONENT: DType.U8}.get(self, DType.F32)

    @property
    def one_byte(self) -> bool:
        """Whether a scale is one byte; it is then delivered as stored and never widened to float32."""
        return self.dtype is not DType.F32


class Activations(StrEnum):
    """How the input of a Linear is quantized; the values are the words for it in messages."""

    WIDE = "16-bit"
    FP8_STATIC = "fp8 static per tensor"
    FP8_TOKEN = "fp8 dynamic per token"
    FP8_GROUP = "fp8 dynamic per group of 128"
    FP4_LOCAL = "fp4 dynamic per group of 16"
    MX_FP8 = "fp8 dynamic per group of 32"
    OTHER = "of another kind"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMode:
    """What the Linear of one `QuantAlgo` holds, and how the engine treats it.

    Codes and scales:
    `bits` are the accepted code widths; `packing` is the layout of the codes, None for codes that are floats.
    `exact` are the strategies whose scales are delivered unchanged; for those in `widened` scales are repeated, which
    changes no value. `group_sizes` are the group sizes that the kernel accepts; for larger groups scales are repeated.
    `block` is the size of a block as (rows, columns). `zero_point` says whether the mode has additive zeros.
    `scale_dtypes` are the dtypes of stored scales that the kernel does not round, None for all. `unit_scalars` are
    scalars that it multiplies with beside the scales; they are delivered as 1.

    Inputs:
    `activations` is the kind of activations that the Linear computes on. Schemes with one of `other_activations` are
    held too, with a note. `pre_quant_scale` says that a Linear that is not fused requires a `pre_quant_scale` for its
    input. `input_scale` is the stored tensor that the delivered `input_scale` is made from, None if the Linear reads
    none. `quantizes_attention_output` marks the modes with which attention may write quantized values for `o_proj`.
    `note` says what else differs for every scheme.

    Dtypes:
    `dtypes` are the dtypes of the model whose activations the kernels of Linears and experts take, `linear_dtypes_on`
    those of Linears on the SMs that it names. Kernels with any other assert at the first forward.

    Sizes:
    N must be a multiple of `row_multiple` (`fused_row_multiple` if several Linears are fused) and K a multiple of
    `column_multiple`, or of the number in `column_multiple_on` on the SMs that it names; otherwise the kernel or the
    engine's weight preparation asserts, or scales are misplaced. N and K of experts must be multiples of
    `expert_multiple` too. This applies to each rank's slice as well. Newer releases slice Linears that are not fused at
    multiples of `alignment`, and of the group size if scales are per group.

    Names in the engine:
    `shared_scalars` are the tensors that must be equal in all parts of a fused Linear; the engine asserts it.
    `read_of_all_experts` are the scalars that every rank reads of all experts. `repeated_with_kv_heads` are the tensors
    that the engine repeats when there are more ranks than K/V heads. `expert_scale_alias` is a second name of an
    expert's `weight_scale` that some releases read. `class_joins_scales` says that a model class which joins Linears
    itself (`ClassRow.joins`) joins the scales of this mode too; it reads them by that second name only.
    `config_fields` are the keys of the mode's entry in `hf_quant_config.json` besides algorithm and group size.
    `aliases` are other names of the algorithm in that file, in lower case.

    Releases:
    `linear_since` and `experts_since` are the first releases whose Linears and routed experts have the mode, None if no
    release has it; `head_since` is the first one whose head may have it. `plug_in` marks a mode whose Linear this
    package adds to an engine. `linear_on` and `experts_on` are the first releases on the SMs that they name, None if no
    release runs there. A mode with `known_sm` is planned only if the SM is known. On the SMs in `linear_rounds_on` and
    `experts_round_on` the kernel exists, and rounds the product of each code and its scale to fewer bits. On those in
    `requantized_on` the engine quantizes weights again while it loads them, with scales that are powers of two, since
    these releases.
    `bias_since` is the first release whose Linear adds a bias, None if all do; `bias_on` is the same on the SMs that it
    names. Releases before it load the bias and ignore it.
    """

    algo: QuantAlgo
    element: Element
    bits: frozenset[int]
    packing: Packing | None
    scale: ScaleForm
    exact: frozenset[Strategy]
    widened: frozenset[Strategy] = frozenset()
    group_sizes: tuple[int, ...] = ()
    block: tuple[int, int] | None = None
    zero_point: bool = False
    scale_dtypes: frozenset[DType] | None = None
    unit_scalars: tuple[str, ...] = ()

    activations: Activations = Activations.WIDE
    other_activations: frozenset[Activations] = frozenset()
    pre_quant_scale: bool = False
    input_scale: str | None = None
    quantizes_attention_output: bool = False
    note: str = ""

    dtypes: frozenset[DType] = MODEL_DTYPES
    linear_dtypes_on: Mapping[int, frozenset[DType]] = field(default_factory=dict, hash=False)

    row_multiple: int = 1
    fused_row_multiple: int = 1
    column_multiple: int = 1
    column_multiple_on: Mapping[int, int] = field(default_factory=dict, hash=False)
    expert_multiple: int = 1
    alignment: int = 1

    shared_scalars: tuple[str, ...] = ()
    read_of_all_experts: frozenset[str] = frozenset()
    repeated_with_kv_heads: frozenset[str] = frozenset({"weight", "bias"})
    expert_scale_alias: str | None = None
    class_joins_scales: bool = False
    config_fields: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    linear_since: Release | None = None
    experts_since: Release | None = None
    head_since: Release | None = None
    plug_in: bool = False
    linear_on: Mapping[int, Release | None] = field(default_factory=dict, hash=False)
    experts_on: Mapping[int, Release | None] = field(default_factory=dict, hash=False)
    known_sm: bool = False
    linear_rounds_on: frozenset[int] = frozenset()
    experts_round_on: frozenset[int] = frozenset()
    requantized_on: Mapping[int, Release] = field(default_factory=dict, hash=False)
    bias_since: Release | None = None
    bias_on: Mapping[int, Release] = field(default_factory=dict, hash=False)

    @property
    def codes(self) -> str:
        """The codes in words, such as `int1-4` or `fp8`."""
        widths = "-".join(str(bits) for bits in sorted({min(self.bits), max(self.bits)}))
        return f"{'int' if self.element is Element.INT else 'fp'}{widths}"

    @property
    def entry_group_size(self) -> int | None:
        """The `group_size` in `hf_quant_config.json`, if the mode alone determines it; else None."""
        return self.block[1] if self.block else None

    @property
    def unscaled_attention_output(self) -> bool:
        """Whether attention that writes quantized values has no scale for them, and takes 1."""
        return self.quantizes_attention_output and self.input_scale is None

    def columns_on(self, sm: int | None) -> int:
        """Return the number that K must be a multiple of on an SM; on all SMs together if it is not known."""
        if sm is None:
            return lcm(self.column_multiple, *self.column_multiple_on.values())
        return self.column_multiple_on.get(sm, self.column_multiple)

    def dtypes_on(self, sm: int | None, *, expert: bool) -> frozenset[DType]:
        """Return the dtypes of the model that the mode takes on an SM; on all SMs together if it is not known."""
        if expert:
            return self.dtypes
        if sm is None:
            return self.dtypes.intersection(*self.linear_dtypes_on.values())
        return self.linear_dtypes_on.get(sm, self.dtypes)

    @property
    def scales_follow_kv_heads(self) -> bool:
        """Whether scales of K/V heads need no copy for each rank: they are one scalar, or the engine repeats them."""
        return self.scale is ScaleForm.SCALAR or "weight_scale" in self.repeated_with_kv_heads

    def cut_by_rows(self, release: Release) -> bool:
        """Whether a model class of the release can cut this Linear's tensors by rows (`ClassRow.splits`).

        It cuts `weight`, and `weight_scale` with two indices if its first size is the same; other scales are copied. So
        codes must not be packed along the rows, and scales must be one scalar, or have a row for each row of codes.
        """
        if self.packing is not None or self.zero_point:
            return False
        by_row = {ScaleForm.SCALAR, ScaleForm.TWO_LEVEL, ScaleForm.EXPONENT}
        return self.scale in by_row or (self.scale is ScaleForm.ROW and release.takes_scale_columns)

    def scale_shape(self, shape: tuple[int, int], group_size: int | None) -> tuple[int, ...]:
        """Return the shape of `weight_scale` for a weight [N, K] in groups of `group_size`."""
        rows, columns = shape
        match self.scale:
            case ScaleForm.SCALAR:
                return ()
            case ScaleForm.ROW:
                return (rows,)
            case ScaleForm.BLOCK if self.block is not None:
                return -(-rows // self.block[0]), -(-columns // self.block[1])
            case _ if group_size is not None:
                return rows, -(-columns // group_size)
        raise AssertionError(f"{self.algo} has groups, and their size is missing")
