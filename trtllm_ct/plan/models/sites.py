"""Which modules a model has: by the tables of its family, or by the headers of its files.

The tables are filled in with the sizes in config.json. So a checkpoint that lacks a module, or whose weights have other
sizes, is refused before any weight is read. A model without such tables has the modules that its files have.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import ConfigError, FaultCollector
from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_defaults import is_tied, text_config_of, with_defaults
from trtllm_ct.plan.models.class_row import DEFAULT_ROW, ClassRow
from trtllm_ct.plan.models.class_rows import CLASS_ROWS
from trtllm_ct.plan.models.discovery import Discovery, discover
from trtllm_ct.plan.models.expert_spellings import (
    NUMBERED,
    NUMBERED_EXPERTS,
    STACKED_EXPERTS,
    spelling_type,
)
from trtllm_ct.plan.models.families import (
    ALWAYS,
    ARCHITECTURES,
    MODEL_TYPES,
    Architecture,
    Experts,
    LinearSite,
)
from trtllm_ct.plan.models.row_defaults import with_row_defaults
from trtllm_ct.plan.models.site import Site
from trtllm_ct.plan.models.sizes import dense_layers_of, nested_text_config, size_under, sizes_of, stated_sizes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from trtllm_ct.plan.stored import StoredModule

__all__ = ["Model", "Site", "known_prefixes", "name_variants"]

# The places that the text model may have in a checkpoint: the prefix of its body and the name of its head. Writers and
# releases of transformers have used each of them. A checkpoint has the first place for which the embedding, the first
# layer or the last norm is stored.
_PLACES = (
    ("model.", "lm_head"),
    ("language_model.model.", "language_model.lm_head"),
    ("model.language_model.", "lm_head"),
    ("model.language_model.model.", "model.language_model.lm_head"),
)


def known_prefixes() -> tuple[str, ...]:
    """Return the prefixes that the names of the text model's body may have."""
    return tuple(body for body, _ in _PLACES)


def name_variants(name: str) -> tuple[str, ...]:
    """Return a module's name, followed by the names that it has if the text model is in another place.

    transformers 4.52 moved text models, so targets and `ignore` may name `language_model.model.layers` where the files
    have `model.language_model.layers`. Some wrappers put the Linear into a child called `linear`.
    """
    variants = [name]
    for this_body, this_head in _PLACES:
        if name == this_head or name.startswith(this_body):
            for body, head in _PLACES:
                variants.append(head if name == this_head else body + name.removeprefix(this_body))
    return tuple(dict.fromkeys([*variants, *(f"{variant}.linear" for variant in variants)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What planning needs to know about a model, read from its config.json.

    `name` is the architecture that config.json names. `tied` says whether the head uses the weight of the embedding;
    None if config.json leaves it to a class that no table describes.
    `biases` are the keys of config.json that give Linears a bias, and `always`. `dense_layers` are the numbers of the
    layers without routed experts.
    `multimodal` says whether the text model is a part of a larger model, whose other parts are delivered plain.
    `text_type` is the `model_type` by which experts are spelled (`expert_spellings.py`), mostly that of the text model.
    `draft_layers` is the number of layers after the last layer that predict further tokens. `vision_head_dim` is the
    number of rows per head in the vision tower, 0 if config.json doesn't give it. `text` is the configuration of the
    text model, with the defaults of its class where tables describe the model.
    `row` says how the engine's class reads a model whose modules no table names; None if `architecture` names them.
    `discovery` are the modules of such a model, None until they are looked up in a checkpoint (`in_checkpoint`).
    """

    name: str
    architecture: Architecture
    dtype: DType
    layers: int
    sizes: Mapping[str, int]
    vocabulary: int
    tied: bool | None
    biases: frozenset[str]
    dense_layers: frozenset[int]
    multimodal: bool
    text_type: str = ""
    draft_layers: int = 0
    vision_head_dim: int = 0
    text: Mapping[str, Any] = field(default_factory=dict)
    row: ClassRow | None = None
    discovery: Discovery | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Model:
        """Return the model that a parsed config.json describes.

        Raises `ConfigError` for sizes that are missing. A model that no table describes needs none.
        """
        names = config.get("architectures") or ["none"]
        name = str(names[0] if isinstance(names, list) else names)
        nested = text_config_of(config)
        family = name if nested is None else MODEL_TYPES.get(str(nested.get("model_type")))
        if family is None or family not in ARCHITECTURES:
            return cls._without_tables(name, config)
        text = with_defaults(config if nested is None else nested, family)
        faults = FaultCollector()
        layers = size_under(text, "num_hidden_layers", faults)
        sizes = sizes_of(text, ARCHITECTURES[family][0], faults)
        architecture = _variant(ARCHITECTURES[family], sizes)
        model = cls(
            name=name,
            architecture=architecture,
            dtype=_model_dtype({**config, **(nested or {})}, faults),
            layers=layers,
            sizes=sizes,
            vocabulary=size_under(text, "vocab_size", faults),
            tied=is_tied(config, nested, family),
            biases=frozenset({ALWAYS} | {key for key in _BIASES if text.get(key)}),
            dense_layers=dense_layers_of(text, layers),
            multimodal=nested is not None,
            text_type=str(text.get("model_type") or ""),
            draft_layers=size_under(text, "num_nextn_predict_layers", faults, default=0, least=0),
            vision_head_dim=_vision_head_dim(config.get("vision_config")),
            text=text,
        )
        faults.raise_if_any(ConfigError)
        return model

    @classmethod
    def _without_tables(cls, name: str, config: Mapping[str, Any]) -> Model:
        """Return a model that no table describes; its modules are looked up in a checkpoint."""
        nested = nested_text_config(config)
        text = config if nested is None else nested
        faults = FaultCollector()
        row = CLASS_ROWS.get(name, DEFAULT_ROW)
        sizes = stated_sizes(with_row_defaults(text, name), row.divided)
        stated = {"tie_word_embeddings": row.tied or None, **(nested or {}), **config}["tie_word_embeddings"]
        model = cls(
            name=name,
            architecture=Architecture(attention=(), mlp=(), norms=(), experts=_experts_of(row)),
            dtype=_model_dtype({**config, **(nested or {})}, faults),
            layers=sizes["layers"],
            sizes=sizes,
            vocabulary=sizes["vocabulary"],
            tied=(row.tied or None) if stated is None else bool(stated),
            biases=frozenset(),
            dense_layers=frozenset(),
            multimodal=nested is not None,
            text_type=spelling_type(str(config.get("model_type") or ""), str(text.get("model_type") or "")),
            vision_head_dim=_vision_head_dim(config.get("vision_config")),
            row=row,
        )
        faults.raise_if_any(ConfigError)
        return model

    def in_checkpoint(
        self, stored: Mapping[str, StoredModule], shapes: Mapping[str, tuple[int, int]] | None = None
    ) -> Model:
        """Return the model with the modules that a checkpoint stores; unchanged if tables describe them.

        `shapes` are the shapes of weights that are known although the headers of their codes don't show them. The
        tables of a text model don't apply if a wrapper stores it under an unknown prefix: then its modules are looked
        up too.
        """
        if self.row is None:
            layers = tuple(f"{body}layers." for body in known_prefixes())
            known = not self.multimodal or any(name.startswith(layers) for name in stored)
            return self if known else self._by_files().in_checkpoint(stored, shapes)
        sizes = self.sizes
        found = discover(
            stored,
            self._row_as_spelled(self.row),
            layers=sizes["layers"],
            head_dim=sizes["head_dim"],
            kv_heads=self.kv_heads,
            shapes=shapes or {},
        )
        return replace(
            self, layers=found.layers, discovery=found, sizes={**sizes, "experts": found.experts or sizes["experts"]}
        )

    def _by_files(self) -> Model:
        """Return the model without the tables of its family."""
        row = CLASS_ROWS.get(self.name, DEFAULT_ROW)
        architecture = Architecture(attention=(), mlp=(), norms=(), experts=_experts_of(row))
        sizes = {"experts": 0, **self.sizes, "layers": self.layers, "vocabulary": self.vocabulary}
        return replace(self, row=row, architecture=architecture, sizes=sizes)

    def _row_as_spelled(self, row: ClassRow) -> ClassRow:
        """Return a row with the names of experts that the class of the text model reads, unless it has its own."""
        numbered = row.projections is None and self.text_type in NUMBERED_EXPERTS
        return replace(row, projections=NUMBERED) if numbered else row

    @property
    def has_row(self) -> bool:
        """Whether it is known how the engine's class reads the model: by the tables of its family, or by a row."""
        return self.row is not DEFAULT_ROW

    @property
    def one_mode(self) -> bool:
        """Whether the engine's class refuses a configuration with entries for single modules (MIXED_PRECISION)."""
        return self.architecture.one_mode if self.row is None else self.row.one_mode

    @property
    def heads(self) -> int:
        """The number of attention heads."""
        return self.sizes["heads"] // self.sizes["head_dim"]

    @property
    def kv_heads(self) -> int:
        """The number of K/V heads."""
        return self.sizes["kv_heads"] // self.sizes["head_dim"]

    def attentions(self, place: tuple[str, str]) -> Iterator[str]:
        """Return the full names of the attention modules of all layers that have K and V projections."""
        if self.discovery is not None:
            names = {site.module for site in self.discovery.at(place)}
            # Nemotron-H calls every part of a layer `mixer`, attention included.
            ends = (".self_attn.v_proj", ".mixer.v_proj")
            values = sorted(name.removesuffix(".v_proj") for name in names if name.endswith(ends))
            return (name for name in values if f"{name}.k_proj" in names)
        return (f"{place[0]}layers.{layer}.self_attn" for layer in range(self.layers))

    def table_names(self, place: tuple[str, str]) -> tuple[str, ...]:
        """Return the names under which the embeddings of the text model may be stored."""
        if self.discovery is None:
            return next(self.sites(place)).stored_names
        tables = (site for site in self.discovery.at(place) if site.class_name == "Embedding")
        return next((site.stored_names for site in tables if site.module.startswith(place[0])), ())

    def weight_shapes(self, stored_names: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight by its full name, for checkpoints whose headers don't show the shapes."""
        if self.row is not None:
            return {}
        places = [place for place in _PLACES if any(name.startswith(f"{place[0]}layers.") for name in stored_names)]
        sites = self.sites((places or _PLACES)[0])
        return {f"{name}.weight": site.shape for site in sites for name in site.stored_names}

    def place(self, stored_modules: Collection[str]) -> tuple[str, str]:
        """Return the prefix of the text model's body and the name of its head, given the names of stored modules."""
        if self.discovery is not None:
            body = self.discovery.place[0]
            if any(name.startswith(body) for name in stored_modules):
                return self.discovery.place
        for body, head in _PLACES:
            if any(
                f"{body}{probe}" in stored_modules for probe in ("embed_tokens", "layers.0.input_layernorm", "norm")
            ):
                return body, head
        return _PLACES[0]

    def sites(self, place: tuple[str, str] = _PLACES[0]) -> Iterator[Site]:
        """Yield every module that must have a weight, in the order of the model; a tied head has none.

        `place` is what the method `place` returns.
        """
        if self.row is not None:
            if self.discovery is None:
                raise AssertionError("the modules of this model are looked up in a checkpoint first")
            yield from self.discovery.at(place)
            return
        body, head = place
        hidden, norm = self.sizes["hidden"], self.architecture.norm_class
        table = (self.vocabulary, hidden)
        cut = self.architecture.embedding
        yield Site(
            module=f"{body}embed_tokens",
            class_name="Embedding",
            shape=table,
            plain=True,
            cut=cut,
            # Some writers store the weight of a tied head only under the name of the head.
            aliases=(head,) if self.tied else (),
        )
        for layer in range(self.layers):
            prefix = f"{body}layers.{layer}."
            for entry in self.architecture.norms:
                yield Site(module=prefix + entry.path, class_name=norm, shape=(self.sizes[entry.size],))
            for site in self.architecture.attention:
                yield self._linear(prefix, site, attention=True)
            experts = self.architecture.experts
            if experts is None or layer in self.dense_layers:
                for site in self.architecture.mlp:
                    yield self._linear(prefix, site)
            else:
                yield from self._experts(prefix, experts)
        yield Site(module=f"{body}norm", class_name=norm, shape=(hidden,))
        if not self.tied:
            # For draft layers, engines may slice the weight of the head as a plain one (`_torch/modules/embedding.py:
            # LMHead.forward`, pull request 16511).
            plain = self.draft_layers > 0
            yield Site(module=head, class_name="Linear", shape=table, plain=plain, head=True, cut=Cut.VOCABULARY)

    def _linear(self, prefix: str, site: LinearSite, *, attention: bool = False) -> Site:
        """Return the site of a Linear in the layer with this prefix."""
        bias = ("bias",) if site.bias in self.biases else ()
        group = site.fused or site.class_joins
        return Site(
            module=prefix + site.path,
            class_name="Linear",
            shape=(self.sizes[site.outputs], self.sizes[site.inputs]),
            mode_group=prefix + group if group else None,
            # Behind the last part that a class joins there is none whose scales could be misplaced.
            fused=group is not None and group != site.path,
            shares=prefix + group if group else None,
            plain=site.plain,
            locals=bias + site.extras,
            cut=site.cut,
            heads=self.kv_heads if site.cut is Cut.KV_HEADS else None,
            parts=tuple(self.sizes[part] for part in site.parts),
            class_cuts=site.class_cuts,
            class_joins=site.class_joins is not None,
            attention=attention,
            ranks_vary=self.architecture.mlp_ranks_vary and not attention,
        )

    def _experts(self, prefix: str, experts: Experts) -> Iterator[Site]:
        """Yield the sites of a layer's router, shared experts and routed experts, in this order.

        All routed experts of a layer are in one mode group. Those that a class reads from one tensor are plain: the
        tensors of a mode are described for experts one by one.
        """
        yield self._linear(prefix, experts.router)
        for site in experts.shared:
            yield self._linear(prefix, site)
        gate, up, down = experts.projections
        hidden, inner = self.sizes["hidden"], self.sizes[experts.intermediate]
        shapes = {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
        aliases = dict(experts.aliases)
        mode_group = prefix + experts.path
        for expert in range(self.sizes[experts.count]):
            expert_prefix = f"{mode_group}.{expert}."
            shares = f"{expert_prefix}gate_up"
            for projection, shape in shapes.items():
                alias = (expert_prefix + aliases[projection],) if projection in aliases else ()
                yield Site(
                    module=expert_prefix + projection,
                    class_name="Linear",
                    shape=shape,
                    mode_group=mode_group,
                    shares=None if projection == down else shares,
                    plain=self.text_type in STACKED_EXPERTS,
                    expert=True,
                    aliases=alias,
                    other_layouts=experts.other_layouts,
                    cut=Cut.ROW if projection == down else Cut.COLUMN,
                )


def _experts_of(row: ClassRow) -> Experts:
    """Return the routed experts of a model with a row, if it has any."""
    router = LinearSite(path="", outputs="experts", inputs="hidden", plain=True)
    projections = row.projections or ("gate_proj", "up_proj", "down_proj")
    return Experts(path=row.experts, projections=projections, count="experts", intermediate="experts", router=router)


_BIASES = ("attention_bias", "mlp_bias", "qkv_bias")


def _vision_head_dim(vision: object) -> int:
    """Return the head size of a vision tower, given `vision_config` of a config.json; 0 if it can't be determined."""
    sizes = vision if isinstance(vision, dict) else {}
    head_dim, hidden, heads = (sizes.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(head_dim, int):
        return head_dim
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0


def _variant(variants: tuple[Architecture, ...], sizes: Mapping[str, int]) -> Architecture:
    """Return the first variant of a family for which all sizes of attention are given; otherwise the last variant."""
    for variant in variants[:-1]:
        if all({site.outputs, site.inputs} <= sizes.keys() for site in variant.attention):
            return variant
    return variants[-1]


def _model_dtype(config: Mapping[str, Any], faults: FaultCollector) -> DType:
    """Return `dtype` (transformers 5) or `torch_dtype` (transformers 4); bfloat16 if config.json has neither."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    try:
        dtype = DType.from_torch(name)
    except KeyError:
        dtype = None
    if dtype is not None and dtype.is_wide_float:
        return dtype
    faults.add(
        where="config.json: dtype",
        expected="bfloat16, float16 or float32",
        found=repr(name),
        remedy="Set the dtype that the model computes in.",
    )
    return DType.BF16
