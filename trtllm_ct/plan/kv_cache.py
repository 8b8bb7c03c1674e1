"""KV-cache scales: the names under which writers store them, which of them a target reads, and under which names.

compressed-tensors stores them in the attention module (`self_attn.k_scale`, since 0.6); earlier releases stored them in
the projections (`k_proj.output_scale`). Engines read them in the projections (`self_attn.k_proj.k_scale`): one float32
element each, which the stored fp8 value is multiplied by. Of scales per attention head the largest is delivered.
Sources: compressed-tensors 0.5 and 0.20 `quantization/lifecycle/initialize.py`; vLLM 0.33
`model_loader/weight_utils.py` for other writers; TensorRT-LLM `_torch/modules/linear.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.lost_remedies import FETCH
from trtllm_ct.base.schemes import NumberType, QuantArgs, Strategy
from trtllm_ct.engine.target import UNREAD_BY_DENSE
from trtllm_ct.plan.deliver import kv_scale
from trtllm_ct.plan.models.discovery import is_draft

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.models.site import Site
    from trtllm_ct.plan.plan import Delivery, ModulePlan
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["KvCache", "attentions", "heads_of_attentions"]

# Last part of the module's name -> local name of the scale -> the projections that the scale belongs to.
_HOLDERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "self_attn": {"k_scale": ("k",), "v_scale": ("v",), "kv_scale": ("k", "v")},
    "mixer": {"k_scale": ("k",), "v_scale": ("v",), "kv_scale": ("k", "v")},
    "k_proj": {"output_scale": ("k",), "k_scale": ("k",)},
    "v_proj": {"output_scale": ("v",), "v_scale": ("v",)},
    # A writer that fuses q/k/v gives the fused Linear both scales; vLLM knows the second name from Qwen3-MoE.
    "qkv_proj": {"k_scale": ("k",), "v_scale": ("v",), "kv_scale": ("k", "v")},
    "qkqkv_proj": {"k_scale": ("k",), "v_scale": ("v",)},
    "k_cache": {"scale": ("k",)},
    "v_cache": {"scale": ("v",)},
}
# If a checkpoint has several scales for one projection, the first of these is used. There may be several because
# quantized outputs have a scale on the projections too.
_PREFERENCE = ("k_scale", "v_scale", "scale", "kv_scale", "output_scale")
# The strategies with stored scales: one for each projection of a layer, or one for each of its heads.
_STATIC = (Strategy.TENSOR, Strategy.ATTN_HEAD)
# The engine's names of the caches with 8 bits, by number type.
_ALGOS: Mapping[tuple[NumberType, int], str] = {(NumberType.FLOAT, 8): "FP8", (NumberType.INT, 8): "INT8"}
_NO_NAMES = frozenset[str]()
_ALONE = "no module is delivered quantized, and the configuration of the engine can't state a quantized cache alone"
_IGNORED = {
    "q_scale": "engines don't quantize queries",
    "q_zero_point": "engines don't quantize queries",
    "k_zero_point": "the KV cache is symmetric",
    "v_zero_point": "the KV cache is symmetric",
    "output_zero_point": "the KV cache is symmetric",
}
_TENSORS = frozenset({"k_scale", "v_scale", "kv_scale", *_IGNORED})
# Behind the prefix of the text model's body, the name of an attention; Nemotron-H calls it `mixer`.
_OF_LAYER = re.compile(r"(?:layers|h|blocks|block)\.\d+\.(?:self_attn|mixer)")
_ATTENTION_PARTS = frozenset({"self_attn", "mixer"})


def attentions(sites: Iterable[Site], body: str) -> list[str]:
    """Return the full names of the attention modules with k_proj and v_proj, under whose names engines read the scales.

    These are in layers of the text model, whose body has the prefix `body`: a vision tower has no KV cache.

    The scales are loaded by the fused Linear of q, k and v. DeepSeek's latent attention has no such Linear. Of Phi-3's
    stored qkv_proj, its class passes on weight, weight_scale, weight_scale_2 and input_scale only. Both caches have
    scale 1. Source: TensorRT-LLM `_torch/modules/linear.py` (kv_scales) and `_torch/models/modeling_phi3.py:
    load_weights`, read on 2026-11-29.
    """
    # Nemotron-H calls every part of a layer `mixer`, attention included.
    ends = tuple(f".{attention}.{leaf}" for attention in ("self_attn", "mixer") for leaf in ("k_proj", "v_proj"))
    names = {site.module for site in sites if site.module.endswith(ends)}
    values = (name.removesuffix(".v_proj") for name in names if name.endswith(".v_proj"))
    return sorted(name for name in values if f"{name}.k_proj" in names and _is_in_layer(name, body))


def heads_of_attentions(sites: Iterable[Site]) -> dict[str, int]:
    """Return the number of K/V heads of each attention by its full name: layers of one model may have different ones.

    Values may have heads of another size than keys, so keys decide.
    """
    keys = {site.module: site.heads for site in sites if site.heads and site.module.endswith(".k_proj")}
    return {name.removesuffix(".k_proj"): heads for name, heads in keys.items()}


def _is_in_layer(name: str, body: str) -> bool:
    """Whether a name is that of an attention in a layer of the text model, whose body has the prefix `body`."""
    return name.startswith(body) and _OF_LAYER.fullmatch(name.removeprefix(body)) is not None


@dataclass(frozen=True, slots=True)
class KvCache:
    """How a checkpoint quantizes its KV cache, and which of that a target supports.

    `alone` is set when no module is delivered quantized: ModelOpt's configuration can't describe a quantized cache
    without quantized modules, and the engine refuses one without an algorithm. `chosen` maps the name of each delivered
    scale to the stored tensor that it is made from. `has_projections` says whether attention has k_proj and v_proj,
    under whose names engines read scales; see `attentions`. `attentions` are the full names of the attentions
    whose k_proj and v_proj are stored, in layers of the text model and in draft layers. `heads` are the numbers of K/V
    heads of attentions (`heads_of_attentions`); any other has `kv_heads`, the number in config.json.
    """

    config: QuantizationConfig
    target: Target
    kv_heads: int
    alone: bool = False
    chosen: Mapping[str, str] = field(default_factory=dict)
    has_projections: bool = True
    attentions: frozenset[str] = frozenset()
    heads: Mapping[str, int] = field(default_factory=dict)

    def among(self, modules: Collection[StoredModule], body: str) -> KvCache:
        """Return this value for these stored modules: with `attentions`, and with one scale for each projection.

        `body` is the prefix of the text model's body.
        """
        weights = {module.name for module in modules if module.has_weight}
        values = (name.removesuffix(".v_proj") for name in weights if name.endswith(".v_proj"))
        attentions = frozenset(
            name for name in values if f"{name}.k_proj" in weights and (_is_in_layer(name, body) or is_draft(name))
        )
        best: dict[str, tuple[int, str]] = {}
        for module in modules:
            for local, letters in _HOLDERS.get(module.name.rpartition(".")[2], {}).items():
                if local in module.views:
                    for name in (_delivered_name(module.name, letter) for letter in letters):
                        ranked = (_PREFERENCE.index(local), module.delivered_name(local))
                        best[name] = min(ranked, best.get(name, ranked))
        return replace(self, attentions=attentions, chosen={name: source for name, (_, source) in best.items()})

    @property
    def algo(self) -> str | None:
        """The engine's KV-cache mode, None when the cache is not quantized or the target has no such mode."""
        args = self.args
        name = _ALGOS.get((args.type, args.num_bits)) if args is not None else None
        capabilities = self.target.capabilities
        if self.alone and not capabilities.kv_cache_alone:
            return None
        return name if name in capabilities.kv_cache else None

    @property
    def args(self) -> QuantArgs | None:
        """The scheme of the cache: `kv_cache_scheme`, or the inputs of a group that targets only attention modules."""
        if self.config.kv_cache_scheme is not None:
            return self.config.kv_cache_scheme
        return next((group.scheme.input_activations for group in self.config.groups if _is_of_attention(group)), None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about what the target can't use of the cache's scheme."""
        args = self.args
        if args is None or not self.target.holds_codes:
            return ()
        if self._only_alone:
            return (f"KV cache: {_ALONE}; pass KvCacheConfig(dtype='fp8') to have one, without the stored scales",)
        if self.algo is None:
            return (f"KV cache: {self.target.capabilities.name} has no {args.label()} cache; it stays 16-bit",)
        if not self.has_projections:
            return ("KV cache: the engine reads no scales for this attention, so its cache has scale 1",)
        notes = []
        if not args.symmetric:
            notes.append("KV cache: that of the engine is symmetric, so stored zero points are left out")
        if args.strategy is Strategy.ATTN_HEAD and args.dynamic is False:
            notes.append(
                f"KV cache: the engine takes one scale for all heads, so it gets the largest of {args.label()}"
            )
        elif args.strategy is not Strategy.TENSOR:
            # Scales of more than one element are a fault, so what is stored is one scale, or none for a dynamic scheme.
            scale = "the stored one" if args.dynamic is False else "1 where none is stored"
            notes.append(f"KV cache: the engine takes one fixed scale, {scale}, instead of {args.label()}")
        return tuple(notes)

    @property
    def origin(self) -> str:
        """The part of the configuration that the scheme of the cache is from, for messages."""
        if self.config.kv_cache_scheme is not None:
            return "kv_cache_scheme"
        groups = [group for group in self.config.groups if _is_of_attention(group)]
        return f"{groups[0].name} of config_groups" if groups else "its scheme"

    @property
    def _only_alone(self) -> bool:
        """Whether the target has a cache of this kind, but not beside plain modules only."""
        return self.algo is None and replace(self, alone=False).algo is not None

    def holds(self, module: StoredModule) -> frozenset[str]:
        """Return the local names of a module's tensors that belong to the KV cache or to quantized attention.

        Engines don't quantize attention; its tensors are ignored.
        """
        scales = _HOLDERS.get(module.name.rpartition(".")[2])
        if scales is None:
            return _NO_NAMES
        return frozenset(module.specs.keys() & (scales.keys() | _IGNORED.keys()))

    def is_dropped(self, module: StoredModule) -> bool:
        """Whether a target for plain weights has no use for a module, since it stores nothing but scales of caches.

        It may have any name: nothing is lost with it.
        """
        return not self.target.holds_codes and module.specs.keys() <= _TENSORS

    def deliver(self, module: StoredModule, faults: FaultCollector) -> tuple[tuple[Delivery, ...], dict[str, str]]:
        """Return the deliveries of a module's KV-cache scales, and its ignored tensors with the reason for each."""
        scales = _HOLDERS.get(module.name.rpartition(".")[2], {})
        deliveries: list[Delivery] = []
        ignored: dict[str, str] = {}
        for local in sorted(self.holds(module)):
            reason = _IGNORED.get(local) or self._unused(module, local)
            if reason is None:
                reason = self._wrong_size(module, local, faults)
            if reason is not None:
                ignored[local] = reason
                continue
            full_name = module.delivered_name(local)
            names = [_delivered_name(module.name, letter) for letter in scales[local]]
            names = [name for name in names if self.chosen.get(name, full_name) == full_name]
            deliveries.extend(kv_scale(module, local, name) for name in names)
            if not names:
                ignored[local] = "another tensor holds this scale of the KV cache"
        return tuple(deliveries), ignored

    def check_complete(self, modules: Iterable[ModulePlan], prefixes: Iterable[str], faults: FaultCollector) -> None:
        """Add a fault for each scale that is missing in a layer; engines would leave it uninitialised.

        `prefixes` are the names of the attention modules of all layers.
        """
        args = self.args
        static = args is not None and args.strategy in _STATIC and args.dynamic is False
        if self.algo is None or not self.has_projections or not static:
            return
        delivered = {delivery.name for module in modules for delivery in module.deliveries}
        faulty = {fault.where for fault in faults.faults}
        for prefix in prefixes:
            for letter in "kv":
                where = f"{prefix}.{letter}_scale"
                if f"{prefix}.{letter}_proj.{letter}_scale" not in delivered and where not in faulty:
                    faults.add(
                        where=where,
                        expected=f"the scale that {self.origin} promises",
                        found="no such tensor" if self.chosen else "no scale of the KV cache in any layer",
                        remedy=f"{FETCH if self.chosen else 'Calibrate the KV cache with llm-compressor'}; or remove "
                        f"{self.origin} to serve a 16-bit cache, {UNREAD_BY_DENSE}",
                    )

    def _unused(self, module: StoredModule, local: str) -> str | None:
        """Return why a module's scale of this local name is not delivered, whatever its shape; None if it may be."""
        if self.args is None:
            what = "outputs" if local == "output_scale" else "the KV cache"
            return f"the configuration leaves {what} unquantized"
        if self.algo is None:
            return _ALONE if self._only_alone else f"target {self.target.name} leaves the KV cache alone"
        if not self.has_projections:
            return "the engine reads no KV-cache scales for attention without k_proj and v_proj"
        if _attention_of(module.name) not in self.attentions:
            return "no k_proj and v_proj of the text model are stored there, under whose names the engine would read it"
        return None

    def _wrong_size(self, module: StoredModule, local: str, faults: FaultCollector) -> str | None:
        """Return why a scale of this shape is not delivered; None for one element, or one per head by the scheme.

        Any other shape is a fault.
        """
        spec = module.specs[local]
        per_head = self.args is not None and self.args.strategy is Strategy.ATTN_HEAD
        heads = self.heads.get(_attention_of(module.name), self.kv_heads)
        if spec.numel == 1 or (per_head and spec.numel == heads):
            return None
        faults.add(
            where=f"{module.stored_name}.{local}",
            expected="one element" + (f", or one for each of the {heads} K/V heads of the layer" if per_head else ""),
            found=str(spec),
            remedy=f"Calibrate the KV cache again with strategy tensor, remove {self.origin} for a 16-bit cache, "
            f"{UNREAD_BY_DENSE}",
        )
        return "of the wrong size"


def _is_of_attention(group: ConfigGroup) -> bool:
    """Whether a group targets only attention modules, whose inputs are queries, keys and values."""
    attention = all(target.endswith("Attention") for target in group.targets)
    return bool(group.targets) and attention and group.scheme.weights is None


def _delivered_name(module: str, letter: str) -> str:
    """Return the name that engines read, such as `...self_attn.k_proj.k_scale`.

    `module` is the attention module, or a module inside of it, that stores the scale; `letter` is k or v.
    """
    return f"{_attention_of(module)}.{letter}_proj.{letter}_scale"


def _attention_of(module: str) -> str:
    """Return the name of the attention that a module is or belongs to; empty if there is none."""
    parts = module.split(".")
    last = next((at for at in reversed(range(len(parts))) if parts[at] in _ATTENTION_PARTS), -1)
    return ".".join(parts[: last + 1])
