"""Producers that are known to write wrong or surprising numbers, and the warning that a user gets for each.

Nothing here changes a number: such a checkpoint is read as it was written. An entry of `PRODUCERS` applies because of
the release that wrote the checkpoint together with its headers, or because of its values alone. A value that can't be
right at all is also a fault (`trtllm_ct.pipeline.payload`); the warning then says where it came from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import Strategy
from trtllm_ct.config.match import matches
from trtllm_ct.layouts.stored_array import StoredTensors, unpack_along_rows

if TYPE_CHECKING:
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.plan.plan import ModulePlan

__all__ = ["PRODUCERS", "Headers", "Producer", "ValueWatch", "header_warnings"]

Release = tuple[int, ...]
HeaderTest = Callable[["Headers"], int]
ValueTest = Callable[["ModulePlan", StoredTensors], bool]

_LAST_WITHOUT_VERSION = (0, 10, 2)
_KV_SCALES = ("k_scale", "v_scale", "kv_scale", "output_scale")
_SMOOTHING = frozenset({"AWQModifier", "SmoothQuantModifier", "SpinQuantModifier"})
# llm-compressor's mappings for these smooth attention alone.
_ATTENTION_ONLY = frozenset({"MixtralForCausalLM", "DeepseekV2ForCausalLM"})
_OFFSET_NORMS = ("Gemma",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """What is known about a checkpoint before its values are read."""

    config: QuantizationConfig
    architecture: str
    modules: Sequence[ModulePlan]

    def count(self, test: Callable[[ModulePlan], bool]) -> int:
        """Return how many modules pass a test."""
        return sum(map(test, self.modules))


@dataclass(frozen=True, slots=True, kw_only=True)
class Producer:
    """One defect or oddity of some releases: `since` is the first with it, `fixed` the first without it again.

    `in_headers` returns the number of modules that are affected, judged from headers. `in_values` says whether one
    module is affected, judged from its tensors. Exactly one of the two is set. `warning` says what the defect means and
    what to do; `source` is the evidence.
    """

    name: str
    warning: str
    source: str
    since: Release = ()
    fixed: Release | None = None
    in_headers: HeaderTest | None = None
    in_values: ValueTest | None = None

    def covers(self, release: Release) -> bool:
        """Whether a release has the defect.

        For a checkpoint that names no release: whether the defect existed by 0.10.2, the last release whose checkpoints
        may lack a version.
        """
        if not release:
            return self.since <= _LAST_WITHOUT_VERSION
        return self.since <= release and (self.fixed is None or release < self.fixed)


def header_warnings(config: QuantizationConfig, architecture: str, modules: Sequence[ModulePlan]) -> tuple[str, ...]:
    """Return the warnings that follow from a checkpoint's release and headers, with the number of affected modules."""
    headers = Headers(config=config, architecture=architecture, modules=modules)
    warnings = []
    for producer in PRODUCERS:
        if producer.in_headers is not None and producer.covers(config.release):
            count = producer.in_headers(headers)
            if count:
                warnings.append(_with_count(producer, count))
    return tuple(warnings)


@dataclass(slots=True)
class ValueWatch:
    """Looks for the values that known producers write, in one module after another."""

    _seen: Counter[str] = field(init=False, default_factory=Counter)

    def look(self, module: ModulePlan, stored: StoredTensors) -> tuple[str, ...]:
        """Return the warnings for a module that no module before it gave; `stored` has its tensors by local name.

        Only small tensors are read.
        """
        producers = [
            producer for producer in PRODUCERS if producer.in_values is not None and producer.in_values(module, stored)
        ]
        self._seen.update(producer.name for producer in producers)
        return tuple(producer.warning for producer in producers if self._seen[producer.name] == 1)

    @property
    def warnings(self) -> tuple[str, ...]:
        """All warnings so far, each with the number of affected modules."""
        return tuple(
            _with_count(producer, self._seen[producer.name]) for producer in PRODUCERS if self._seen[producer.name]
        )


def _with_count(producer: Producer, count: int) -> str:
    """Return the producer's warning with the number of affected modules."""
    return f"{producer.warning} ({count} module{'s' if count > 1 else ''})"


def _mxfp4(headers: Headers) -> int:
    def is_mxfp4(module: ModulePlan) -> bool:
        return module.weight is not None and module.weight.format.name == "mxfp4-pack-quantized"

    return headers.count(is_mxfp4)


def _static_kv_scales(headers: Headers) -> int:
    scheme = headers.config.kv_cache_scheme
    if scheme is None or scheme.dynamic is not False:
        return 0
    return headers.count(lambda module: any(local in module.views for local in _KV_SCALES))


def _rotated_with_bias(headers: Headers) -> int:
    """Count the Linears with a bias whose weight was rotated at its output."""
    rotations = [transform for transform in headers.config.transforms if transform.location == "weight_output"]

    def rotated(module: ModulePlan) -> bool:
        def named(entries: Collection[str]) -> bool:
            return any(matches(module.name, entry) for entry in entries)

        return any(named(rotation.targets) and not named(rotation.ignore) for rotation in rotations)

    return headers.count(lambda module: module.class_name == "Linear" and "bias" in module.views and rotated(module))


def _surplus_zero_points(headers: Headers) -> int:
    def surplus(module: ModulePlan) -> bool:
        weight = module.weight
        if weight is None or weight.zero_point is None or weight.zero_point_packing is None:
            return False
        return module.views[weight.zero_point].spec.shape[1] > weight.scale_shape[1]

    return headers.count(surplus)


def _marlin_24_groups(headers: Headers) -> int:
    """Count the marlin-24 modules with group scales in a checkpoint that names its release.

    For a checkpoint without a release, `WeightReader` warns instead about how it is read.
    """

    def grouped(module: ModulePlan) -> bool:
        weight = module.weight
        return weight is not None and weight.format.name == "marlin-24" and weight.args.strategy is Strategy.GROUP

    return headers.count(grouped) if headers.config.release else 0


def _undated_odd_widths(headers: Headers) -> int:
    """Count the modules with codes of 3, 5, 6 or 7 bits whose words would have the same shape in both layouts.

    The count is 0 for a checkpoint that names its release, which decides the layout.
    """

    def ambiguous(module: ModulePlan) -> bool:
        weight = module.weight
        if weight is None or weight.packing is None or weight.packing.container.bits % weight.packing.bits == 0:
            return False
        other_layout = replace(weight.packing, dense=not weight.packing.dense)
        return weight.packing.packed_shape(weight.shape) == other_layout.packed_shape(weight.shape)

    return 0 if headers.config.release else headers.count(ambiguous)


def _smoothed_experts(headers: Headers) -> int:
    if "SmoothQuantModifier" not in headers.config.modifiers or headers.architecture in _ATTENTION_ONLY:
        return 0
    return headers.count(lambda module: module.experts is not None)


def _smoothed_offset_norms(headers: Headers) -> int:
    if _SMOOTHING.isdisjoint(headers.config.modifiers) or not headers.architecture.startswith(_OFFSET_NORMS):
        return 0
    return headers.count(lambda module: module.class_name == "RMSNorm")


def _kv_scale_of_zero(module: ModulePlan, stored: StoredTensors) -> bool:  # noqa: ARG001 (a ValueTest)
    return any(local in stored and bool((stored[local].numbers == 0).any()) for local in _KV_SCALES)


def _zero_points_at_the_ends(module: ModulePlan, stored: StoredTensors) -> bool:
    """Whether most zero points lie in the outer quarter of their range.

    A group of weights with values on both sides of zero has no zero point there.
    """
    weight = module.weight
    if weight is None or weight.zero_point is None:
        return False
    zero_point = stored[weight.zero_point].numbers
    if weight.zero_point_packing is not None:
        zero_point = unpack_along_rows(zero_point, weight.zero_point_packing, weight.scale_shape)
    half = 1 << (weight.args.num_bits - 1)
    outer = abs(zero_point + 0.5) > 0.75 * half
    return bool(outer.size) and bool(outer.mean() > 0.5)


def _global_scale_below_one(module: ModulePlan, stored: StoredTensors) -> bool:
    """Whether the divisor is below one.

    The divisor is 2688 / (largest weight), so that weight would be larger than 2688.
    """
    weight = module.weight
    if weight is None or weight.divisor is None:
        return False
    divisor = stored[weight.divisor].numbers
    return bool(((divisor > 0) & (divisor < 1)).any())


PRODUCERS: tuple[Producer, ...] = (
    Producer(
        name="mxfp4-exponents",
        since=(0, 13, 0),
        fixed=(0, 14, 0),
        in_headers=_mxfp4,
        warning=(
            "compressed-tensors 0.13.0 stored the exponents of MXFP4 scales 2 too small, so that every weight is a "
            "quarter of what it should be; quantize the model again with 0.14 or later"
        ),
        source=(
            "compressed-tensors pull requests 538 and 541; 0.13.0 and 0.14.0 "
            "compressors/quantized_compressors/fp4_quantized.py store 125 and 127 for the same scale of 1"
        ),
    ),
    Producer(
        name="kv-scales-release",
        since=(0, 12, 0),
        fixed=(0, 13, 0),
        in_headers=_static_kv_scales,
        warning=(
            "compressed-tensors 0.12 with llm-compressor 0.8 stored KV-cache scales of zero in some models; a target "
            "that uses them refuses these: calibrate the cache again with 0.13 or later, or remove kv_cache_scheme "
            "from config.json to serve a 16-bit cache"
        ),
        source="llm-compressor issues 1928 and 2117",
    ),
    Producer(
        name="rotated-bias",
        since=(0, 11, 0),
        fixed=(0, 16, 0),
        in_headers=_rotated_with_bias,
        warning=(
            "compressed-tensors before 0.16 rotated weights at weight_output and left the biases beside them as they "
            "were, so that these modules are wrong; quantize the model again with 0.16 or later"
        ),
        source="compressed-tensors pull request 679",
    ),
    Producer(
        name="first-expert-smoothed",
        fixed=(0, 13, 0),
        in_headers=_smoothed_experts,
        warning=(
            "llm-compressor before 0.9 smoothed the first expert of each layer only, so that all others are wrong "
            "unless the SmoothQuant mappings in recipe.yaml leave experts out; quantize the model again"
        ),
        source="llm-compressor pull requests 1455 and 2084; 0.9.0 is the first with compressed-tensors 0.13",
    ),
    Producer(
        name="offset-norms-smoothed",
        fixed=(0, 16, 0),
        in_headers=_smoothed_offset_norms,
        warning=(
            "llm-compressor before 0.11 smoothed the norms of this family as if they multiplied by their weight and "
            "not by 1 + weight, so that outputs are garbage; quantize the model again"
        ),
        source="llm-compressor pull request 2500; 0.11.0 is the first with compressed-tensors 0.16",
    ),
    Producer(
        name="surplus-zero-points",
        since=(0, 9, 4),
        fixed=(0, 11, 0),
        in_headers=_surplus_zero_points,
        warning=(
            "zero points have surplus columns, as compressed-tensors 0.9.4 to 0.10.2 wrote them where the rows did not "
            "fill whole words; the columns of the groups are read and nothing is lost"
        ),
        source="compressed-tensors 0.10.2 compressors/quantized_compressors/pack_quantized.py, pull request 376",
    ),
    Producer(
        name="marlin-24-plain-scales",
        fixed=(0, 8, 0),
        in_headers=_marlin_24_groups,
        warning=(
            "compressed-tensors before 0.8.0 forgot to interleave the group scales of marlin-24; they are read in the "
            "order in which it stored them, which engines of that time took for the interleaved one"
        ),
        source="compressed-tensors pull request 203",
    ),
    Producer(
        name="undated-odd-widths",
        in_headers=_undated_odd_widths,
        warning=(
            "codes of 3, 5, 6 or 7 bits fill their words alike in the layouts before and since 0.18, and no version "
            "says which it is; they are read as written before: where a newer release wrote them, set version"
        ),
        source="compressed-tensors pull request 732",
    ),
    Producer(
        name="kv-scales-of-zero",
        in_values=_kv_scale_of_zero,
        warning=(
            "a KV-cache scale of zero means that calibration never saw the cache, which llm-compressor 0.8 is known "
            "for; calibrate it again with a current release, or remove kv_cache_scheme from config.json"
        ),
        source="llm-compressor issues 1928, 2117 and 2853",
    ),
    Producer(
        name="unsigned-zero-points",
        in_values=_zero_points_at_the_ends,
        warning=(
            "most zero points lie at the ends of their range, so that weights are positive or negative only: "
            "auto-round before September 2026 stored unsigned ones like that, and clipped half of the codes; quantize "
            "the model again with a current release"
        ),
        source="auto-round pull request 2273",
    ),
    Producer(
        name="inverted-global-scale",
        in_values=_global_scale_below_one,
        warning=(
            "a weight_global_scale below 1 makes weights larger than 2688: it looks like ModelOpt's multiplier, "
            "whose reciprocal belongs here; convert the model again with compressed-tensors' own converter"
        ),
        source="compressed-tensors 0.20 entrypoints/convert/converters/modelopt_nvfp4.py",
    ),
)
"""All known producers, in the order in which warnings are given."""
