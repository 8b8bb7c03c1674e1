"""`Model`: what planning knows about a model, from its config.json, the row of its class, and its files.

The modules are those of the files (`discovery.py`), and what the engine's class does with them is in the row. Where the
row has the modules of a layer, the files are compared with config.json (`stated_modules.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.arguments import HF_CONFIG, check_arguments
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import ConfigError, FaultCollector
from trtllm_ct.config.model_values import check_model_values, with_whole_numbers
from trtllm_ct.config.not_finite import keys_not_finite
from trtllm_ct.plan.models.class_defaults import is_headless, is_tied, text_config_of, with_defaults
from trtllm_ct.plan.models.class_row import ALWAYS, DEFAULT_ROW, PROJECTION_NAMES
from trtllm_ct.plan.models.class_rows import CLASS_ROWS, TEXT_MODELS
from trtllm_ct.plan.models.discovery import discover, discover_stated
from trtllm_ct.plan.models.expert_spellings import (
    NUMBERED,
    NUMBERED_EXPERTS,
    STACKED_EXPERTS,
    UNKNOWN_SPELLING,
    ExpertSpelling,
    spelling_of,
    spelling_type,
)
from trtllm_ct.plan.models.part_layers import part_layers
from trtllm_ct.plan.models.places import PLACES, known_prefixes
from trtllm_ct.plan.models.row_defaults import with_row_defaults
from trtllm_ct.plan.models.shared_attention import layers_of_queries_only
from trtllm_ct.plan.models.site import Site
from trtllm_ct.plan.models.sizes import dense_layers_of, leaves_of, nested_text_config, sizes_of, stated_sizes
from trtllm_ct.plan.models.stated_modules import StatedModules

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from trtllm_ct.plan.models.class_row import ClassRow
    from trtllm_ct.plan.models.discovery import Discovery
    from trtllm_ct.plan.models.part_layers import PartLayers
    from trtllm_ct.plan.models.stated_modules import Stated
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["Model", "Site"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What planning needs to know about a model.

    `name` is the architecture that config.json names, and `row` says how the engine's class reads it; for a text model
    inside of a larger one it may be the row of the text model. `stated` are the modules that it must have by
    config.json; None if the row doesn't have those of a layer, or if the text model is stored under a prefix that is
    not known. `discovery` are the modules of its files, None until they are looked up in a checkpoint
    (`in_checkpoint`).
    `sizes` are numbers of elements by the names of `sizes.py`. `tied` says whether the head uses the weight of the
    embedding; None if config.json leaves it to a class whose default is not known.
    `headless` says that the class has no head, such as one for embeddings or for scores.
    `multimodal` says whether the text model is a part of a larger model, whose other parts are delivered plain.
    `text_type` is the `model_type` by which experts are spelled (`expert_spellings.py`), mostly that of the text model.
    `spelling` says how the class of transformers reads experts, and `as_transformers` that they are delivered so;
    otherwise they are delivered as the engine's class reads them.
    `draft_layers` is the number of layers after the last layer that predict further tokens. `vision_head_dim` is the
    number of rows per head in the vision tower, 0 if config.json doesn't give it. `text` is the configuration of the
    text model, with the defaults of its class where they are known. `parts` are the numbers of layers of towers, and of
    the stacks of an encoder-decoder. `not_finite` are the keys of config.json whose values are no finite numbers.
    """

    name: str
    row: ClassRow
    stated: StatedModules | None
    dtype: DType
    layers: int
    sizes: Mapping[str, int]
    vocabulary: int
    tied: bool | None
    multimodal: bool
    text_type: str = ""
    headless: bool = False
    spelling: ExpertSpelling = UNKNOWN_SPELLING
    as_transformers: bool = False
    draft_layers: int = 0
    vision_head_dim: int = 0
    text: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[PartLayers, ...] = ()
    discovery: Discovery | None = None
    not_finite: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Model:
        """Return the model that a parsed config.json describes.

        Raises `ConfigError` for sizes that are missing, and for values of a wrong type or out of all bounds. A model
        whose row lists no modules needs no sizes.
        """
        check_arguments({"config": HF_CONFIG}, {"config": config})
        values = FaultCollector()
        check_model_values(config, values)
        values.raise_if_any(ConfigError)
        config = with_whole_numbers(config)
        names = config.get("architectures") or ["none"]
        name = str(names[0] if isinstance(names, list) else names)
        row, nested, text = _row_and_text(name, config)
        faults = FaultCollector()
        sizes = sizes_of(text, row, faults) if row.leaves else stated_sizes(with_row_defaults(text, name), row.divided)
        spelling = spelling_type(str(config.get("model_type") or ""), str(text.get("model_type") or ""))
        model = cls(
            name=name,
            row=row,
            stated=_stated_modules(row, sizes, text),
            dtype=_model_dtype({**config, **(nested or {})}, faults),
            layers=sizes["layers"],
            sizes=sizes,
            vocabulary=sizes["vocabulary"],
            tied=is_tied(config, nested, name) if row.leaves else _stated_tie(row, config, nested),
            multimodal=nested is not None,
            text_type=spelling,
            headless=is_headless(name),
            spelling=spelling_of(spelling),
            draft_layers=sizes["draft_layers"],
            vision_head_dim=_vision_head_dim(config.get("vision_config")),
            text=text,
            parts=part_layers(config),
            not_finite=keys_not_finite(config),
        )
        faults.raise_if_any(ConfigError)
        return model

    def in_checkpoint(
        self, stored: Mapping[str, StoredModule], shapes: Mapping[str, tuple[int, int]] | None = None
    ) -> Model:
        """Return the model with the modules that a checkpoint stores.

        `shapes` are the shapes of weights that are known although neither the headers of their codes show them nor
        config.json. If a wrapper stores its text model under an unknown prefix, config.json states no modules.
        """
        if self.stated is not None:
            layers = tuple(f"{body}layers." for body in known_prefixes())
            if self.multimodal and not any(name.startswith(layers) for name in stored):
                return self._by_files().in_checkpoint(stored, shapes)
            place = _known_place(stored)
            experts = self.text_type in STACKED_EXPERTS
            tied = bool(self.tied) or (self.headless and place[1] not in stored)
            found = discover_stated(stored, self.stated, place, tied=tied, plain_experts=experts)
            return replace(self, discovery=found)
        sizes = self.sizes
        found = discover(
            stored,
            replace(self.row, projections=self._names_of_projections),
            # The two stacks of an encoder-decoder have numbers of layers of their own.
            layers=0 if self.text.get("is_encoder_decoder") else sizes["layers"],
            head_dim=sizes["head_dim"],
            kv_heads=self.kv_heads,
            shapes=shapes or {},
            tied=bool(self.tied) and self.has_row,
            usual_ends=self.as_transformers,
            query_only=layers_of_queries_only(self.row, self.text, sizes["layers"]),
        )
        return replace(
            self, layers=found.layers, discovery=found, sizes={**sizes, "experts": found.experts or sizes["experts"]}
        )

    def _by_files(self) -> Model:
        """Return the model with the modules of its files, as the class that config.json names reads them."""
        return replace(self, row=CLASS_ROWS.get(self.name, DEFAULT_ROW), stated=None)

    @property
    def _names_of_projections(self) -> tuple[str, str, str] | None:
        """The names of an expert's gate, up and down in the class that they are delivered to; None if not known."""
        if self.as_transformers and self.stated is None:
            return self.spelling.projections
        return self.row.projections or (NUMBERED if self.text_type in NUMBERED_EXPERTS else None)

    @property
    def has_row(self) -> bool:
        """Whether it is known how the engine's class reads the model."""
        return self.row is not DEFAULT_ROW

    @property
    def experts(self) -> str:
        """The path of routed experts in a layer; empty if no layer has any."""
        return "" if self.stated is not None and not self.row.router else self.row.experts

    @property
    def projections(self) -> tuple[str, str, str]:
        """The names of an expert's gate, up and down in the class, or most other classes if its own are not known."""
        return self._names_of_projections or PROJECTION_NAMES

    @property
    def heads(self) -> int:
        """The number of attention heads."""
        return self.sizes["heads"] // self.sizes["head_dim"]

    @property
    def kv_heads(self) -> int:
        """The number of K/V heads."""
        return self.sizes["kv_heads"] // self.sizes["head_dim"]

    def table_names(self, place: tuple[str, str]) -> tuple[str, ...]:
        """Return the names under which the embeddings of the text model may be stored."""
        tables = (site for site in self.sites(place) if site.class_name == "Embedding")
        return next((site.stored_names for site in tables if site.module.startswith(place[0])), ())

    def weight_shapes(self, stored_names: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of weights that config.json states, by full name, for headers that don't show them."""
        places = [place for place in PLACES if any(name.startswith(f"{place[0]}layers.") for name in stored_names)]
        stated = self.stated_modules((places or PLACES)[0])
        return {f"{stored}.weight": module.shape for name, module in stated for stored in module.stored_names(name)}

    def stated_modules(self, place: tuple[str, str]) -> Iterator[tuple[str, Stated]]:
        """Yield every module that the model must have by config.json; none if its row has none.

        `place` is what the method `place` returns.
        """
        return iter(()) if self.stated is None else self.stated.modules(place, tied=bool(self.tied) or self.headless)

    def place(self, stored_modules: Collection[str]) -> tuple[str, str]:
        """Return the prefix of the text model's body and the name of its head, given the names of stored modules."""
        if self.discovery is not None:
            body = self.discovery.place[0]
            if any(name.startswith(body) for name in stored_modules):
                return self.discovery.place
        return _known_place(stored_modules)

    def sites(self, place: tuple[str, str] = PLACES[0]) -> Iterator[Site]:
        """Yield the modules that the files have; `place` is what the method `place` returns."""
        if self.discovery is None:
            raise AssertionError("the modules of a model are looked up in a checkpoint first")
        return self.discovery.at(place)

    def kinds(self) -> Iterable[Site]:
        """Return one of the sites that ranks divide alike, each by any name."""
        return {
            (
                site.module if site.heads else site.module.rpartition(".")[2],
                *(site.shape, site.cut, site.parts, site.expert, site.attention, site.ranks_vary),
            ): site
            for site in self.sites()
        }.values()


def _known_place(stored_modules: Collection[str]) -> tuple[str, str]:
    """Return the first place for which the embeddings, the first layer or the last norm is stored."""
    for body, head in PLACES:
        if any(f"{body}{probe}" in stored_modules for probe in ("embed_tokens", "layers.0.input_layernorm", "norm")):
            return body, head
    return PLACES[0]


def _row_and_text(name: str, config: Mapping[str, Any]) -> tuple[ClassRow, Mapping[str, Any] | None, Mapping[str, Any]]:
    """Return the row of a model, the stored configuration of a text model inside of it, and that of the text model.

    The second one is None for a text model by itself. The third one has the defaults of its class, where the row lists
    modules.
    """
    nested = text_config_of(config)
    text_name = name if nested is None else TEXT_MODELS.get(str(nested.get("model_type")), "")
    row = CLASS_ROWS.get(text_name, DEFAULT_ROW)
    if row.leaves:
        return row, nested, with_defaults(config if nested is None else nested, text_name)
    nested = nested_text_config(config)
    return CLASS_ROWS.get(name, DEFAULT_ROW), nested, config if nested is None else nested


def _stated_modules(row: ClassRow, sizes: Mapping[str, int], text: Mapping[str, Any]) -> StatedModules | None:
    """Return the modules that config.json states; None if the row has none. `text` is as in `Model`."""
    leaves = leaves_of(row, sizes)
    if leaves is None:
        return None
    return StatedModules(
        row=row,
        leaves=leaves,
        sizes=sizes,
        biases=frozenset({ALWAYS, *(key for key in row.biases.values() if text.get(key))}),
        dense_layers=dense_layers_of(text, sizes["layers"]),
    )


def _stated_tie(row: ClassRow, config: Mapping[str, Any], nested: Mapping[str, Any] | None) -> bool | None:
    """Return whether the head uses the weight of the embeddings; None if config.json doesn't say it of a new class."""
    key = "tie_word_embeddings"
    stated = next((level[key] for level in (config, nested or {}) if level.get(key) is not None), None)
    if stated is None:
        return None if row is DEFAULT_ROW else row.tied
    return bool(stated)


def _vision_head_dim(vision: object) -> int:
    """Return the head size of a vision tower, given `vision_config` of a config.json; 0 if it can't be determined."""
    sizes = vision if isinstance(vision, dict) else {}
    head_dim, hidden, heads = (sizes.get(key) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(head_dim, int):
        return head_dim
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0


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
