"""Targets: the programs and formats that weights are delivered to, and what each of them can hold."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.engine.build_modes import BUILD_MODES, KERNEL_SMS, UNTESTED, kernel_modes
from trtllm_ct.engine.modes import LINEAR_MODES, Activations
from trtllm_ct.engine.platform import SMS, Platform
from trtllm_ct.engine.releases import DEFAULT_ENGINE, RELEASES, release_named

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.schemes import QuantAlgo
    from trtllm_ct.engine.build_mode import BuildMode
    from trtllm_ct.engine.releases import Release

__all__ = [
    "DENSE",
    "DIRECTORY_TARGETS",
    "ENGINE",
    "ENGINES",
    "MODELOPT",
    "REFERENCE",
    "TARGETS",
    "TENSORRT_LLM",
    "UNREAD_BY_DENSE",
    "Capabilities",
    "Target",
    "target_named",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one release line of an engine can hold; `source` says where these facts were read.

    `linear` are the modes of its Linears, `experts` the modes of its routed experts, `head` the modes of its head and
    `kv_cache` the modes of its KV cache. `kv_cache_alone` says whether the KV cache can be quantized if no module is.
    `dynamic_attention_output` says whether attention honours `force_dynamic_quantization`. `platform` is the release
    with the SM of the GPUs, by which some of these modes are ruled out for some weights; None if there are no kernels
    that differ.
    """

    name: str
    source: str
    platform: Platform | None = None
    linear: frozenset[QuantAlgo] = frozenset()
    experts: frozenset[QuantAlgo] = frozenset()
    head: frozenset[QuantAlgo] = frozenset()
    kv_cache: frozenset[str] = frozenset()
    kv_cache_alone: bool = False
    dynamic_attention_output: bool = False

    def algos(self, *, expert: bool = False, head: bool = False) -> frozenset[QuantAlgo]:
        """Return the modes of routed experts, of the head, or of all other Linears."""
        return self.experts if expert else self.head if head else self.linear

    @property
    def release(self) -> Release | None:
        """The release line, None for capabilities that are not TensorRT-LLM's."""
        return self.platform.release if self.platform else None

    @property
    def sm(self) -> int | None:
        """The SM of the GPUs, None if it is not known."""
        return self.platform.sm if self.platform else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A program or format that weights are delivered to, with the capabilities that plans for it assume.

    `serves` says in a few words which program reads the result. `newer` are the capabilities of later releases; the
    reasons why a module is dequantized mention them. `repeats_kv_scales` says whether scales of K and V are delivered
    once for each rank if there are more ranks than heads: engines repeat the codes, but the scales only in some modes.
    `directory` marks a target that `convert_checkpoint` can write, and `ranks` one whose directory has a file for each
    rank of an engine; `build_modes` are the modes of its Linears, of which the first that holds a weight is taken.
    """

    name: str
    serves: str
    capabilities: Capabilities
    newer: tuple[Capabilities, ...] = ()
    repeats_kv_scales: bool = False
    directory: bool = False
    ranks: bool = False
    build_modes: tuple[BuildMode, ...] = ()

    @property
    def as_classes_read(self) -> bool:
        """Whether model classes of other programs read the result, each with its own spelling of experts."""
        return (self.directory and not self.ranks) or self.capabilities.release is not None

    @property
    def holds_codes(self) -> bool:
        """Whether the target can hold quantized weights."""
        return bool(self.capabilities.linear)

    def algos(self, *, expert: bool, head: bool = False) -> frozenset[QuantAlgo]:
        """Return the modes in which a module may be delivered."""
        return self.capabilities.algos(expert=expert, head=head)


def _capabilities(release: Release) -> Capabilities:
    """Return the capabilities of a release: the modes that it or an earlier release introduced."""
    return Capabilities(
        name=release.name,
        source=release.source,
        platform=Platform(release=release),
        linear=frozenset(mode.algo for mode in LINEAR_MODES if release.has(mode.linear_since)),
        experts=frozenset(mode.algo for mode in LINEAR_MODES if release.has(mode.experts_since)),
        head=frozenset(mode.algo for mode in LINEAR_MODES if release.has(mode.head_since)),
        kv_cache=release.kv_cache,
        dynamic_attention_output=release.dynamic_attention_output,
    )


ENGINES: Mapping[str, Capabilities] = {release.name: _capabilities(release) for release in RELEASES}
"""The capabilities of each release line of stock TensorRT-LLM by name, oldest first."""

_PLUG_INS = frozenset(mode.algo for mode in LINEAR_MODES if mode.plug_in)


def _newer(engine: str) -> tuple[Capabilities, ...]:
    """Return the capabilities of the release lines after this one."""
    names = list(ENGINES)
    return tuple(ENGINES[later] for later in names[names.index(engine) + 1 :])


def _with_plug_ins(stock: Capabilities) -> Capabilities:
    """Return the capabilities together with the modes whose Linears this package adds to the engine."""
    return replace(stock, linear=stock.linear | _PLUG_INS)


def _on(capabilities: Capabilities, sm: int | None) -> Capabilities:
    """Return the capabilities of a release on GPUs with this SM."""
    if capabilities.platform is None:
        raise AssertionError("a release has a platform")
    return replace(capabilities, platform=replace(capabilities.platform, sm=sm))


_NOTHING = Capabilities(name="plain", source="plain weights need no capability")
_NEWEST = _with_plug_ins(ENGINES[RELEASES[-1].name])
# Modes that quantize activations which a scheme may leave 16-bit: a kernel requires that, and here there is none.
_FOR_KERNELS = frozenset(mode.algo for mode in LINEAR_MODES if Activations.WIDE in mode.other_activations)
_EVERYTHING = replace(
    _NEWEST,
    name="reference",
    source="trtllm_ct.reference.linear_layouts: LAYOUTS",
    platform=None,
    linear=_NEWEST.linear - _FOR_KERNELS,
    experts=_NEWEST.experts - _FOR_KERNELS,
    head=frozenset(),
    kv_cache_alone=True,
)

MODELOPT = Target(
    name="modelopt",
    serves="stock TensorRT-LLM, PyTorch backend, without a plug-in",
    capabilities=ENGINES[DEFAULT_ENGINE],
    newer=_newer(DEFAULT_ENGINE),
    directory=True,
)
TENSORRT_LLM = Target(
    name="tensorrt_llm",
    serves="TensorRT-LLM, PyTorch backend, loaded by this package",
    capabilities=_with_plug_ins(ENGINES[DEFAULT_ENGINE]),
    newer=tuple(map(_with_plug_ins, _newer(DEFAULT_ENGINE))),
    repeats_kv_scales=True,
)
DENSE = Target(
    name="dense",
    serves="anything that reads plain Hugging Face weights",
    capabilities=_NOTHING,
    directory=True,
)
UNREAD_BY_DENSE = f"or convert with --to {DENSE.name}, which doesn't need it."
"""The end of the remedy for a tensor that engines read and plain weights do without: scales of inputs and of caches."""

ENGINE = Target(
    name="engine",
    serves="`trtllm-build` of TensorRT-LLM up to 1.2.1, one file per rank",
    capabilities=Capabilities(
        name="tensorrt",
        source="engine/build_modes.py",
        linear=frozenset(mode.algo for mode in BUILD_MODES),
        kv_cache=frozenset({"FP8", "INT8"}),
        kv_cache_alone=True,
    ),
    repeats_kv_scales=True,
    directory=True,
    ranks=True,
    build_modes=BUILD_MODES,
)
REFERENCE = Target(name="reference", serves="the CPU reference engine of this package", capabilities=_EVERYTHING)

TARGETS: Mapping[str, Target] = {target.name: target for target in (MODELOPT, TENSORRT_LLM, DENSE, ENGINE, REFERENCE)}
"""All targets by name."""
DIRECTORY_TARGETS = tuple(name for name, target in TARGETS.items() if target.directory)
"""The names of the targets that `convert_checkpoint` can write."""


def target_named(
    name: str,
    engine: str = DEFAULT_ENGINE,
    *,
    sm: int | None = None,
    additive_zeros: bool = True,
    untested: bool = False,
) -> Target:
    """Return a target by name; targets for TensorRT-LLM get the capabilities of the release `engine`.

    `engine` is a key of `ENGINES` or a stable version, see `release_named`.
    `sm` is the SM of the GPUs that the engine will run on, one of `SMS`. Without it, where SMs have different modes or
    sizes for the same weight, only those are planned that all SMs have in common.
    `additive_zeros` says whether target `tensorrt_llm` may use the Linear of this package for asymmetric int4
    (`W4A16_GPTQ`). `untested` says that the files of target `engine` may have codes in the order of the kernel on GPUs
    of `sm`, which was never tested.
    Raises `UsageError` for an unknown name or SM, with the known ones, and for `untested` without such an SM.
    """
    _require("target", name, TARGETS)
    release = release_named(engine)
    if release is None:
        raise UsageError(
            Fault(
                where="--engine",
                expected=f"{' or '.join(ENGINES)}, or a stable version of one of them",
                found=repr(engine),
                remedy="Name one of these, such as 1.2 or 1.2.1. `trtllm-ct doctor` says which one is installed.",
            )
        )
    target = TARGETS[name]
    if sm is not None or untested:
        sms = KERNEL_SMS if untested else sorted({*SMS, *KERNEL_SMS}) if target is ENGINE else SMS
        _require("--sm", str(sm) if sm else "no SM", {str(known): known for known in sms})
    if target is ENGINE:
        _require("--engine", release.name, {line.name: line for line in RELEASES if line.builds_engines})
    if untested:
        _require(f"--to with {UNTESTED}", name, {ENGINE.name: ENGINE})
        return _with_kernel_modes(sm or 0)
    if target not in (MODELOPT, TENSORRT_LLM):
        return target
    lines = tuple(_on(line, sm) for line in (ENGINES[release.name], *_newer(release.name)))
    if target is TENSORRT_LLM and additive_zeros:
        lines = tuple(map(_with_plug_ins, lines))
    return replace(target, capabilities=lines[0], newer=lines[1:])


def _with_kernel_modes(sm: int) -> Target:
    """Return target `engine` with the modes in the order of the kernel on GPUs of this SM.

    The first of them takes the place of modes that serve all GPUs, and the other holds weights that have no other.
    """
    instead, more = kernel_modes(sm)
    modes = (instead, *BUILD_MODES, more)
    capabilities = replace(ENGINE.capabilities, linear=frozenset(mode.algo for mode in modes))
    return replace(ENGINE, capabilities=capabilities, build_modes=modes)


def _require(where: str, name: str, names: Mapping[str, object]) -> None:
    """Raise `UsageError` if `name` is not among `names`."""
    if name not in names:
        raise UsageError(Fault(where=where, expected=" or ".join(names), found=repr(name), remedy="Name one of these."))
