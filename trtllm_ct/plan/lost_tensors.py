"""Find tensors that a checkpoint has lost or that have another size, for models whose row lists no modules.

Two sources tell what a model must have: its layers and experts, which are alike (`models/alike_layers.py`), and the
class that config.json names, if it can be built (`models/model_class.py`). Where both speak the class decides: what it
has no parameter for is not lost.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.lost_remedies import FETCH, FETCH_OR_OTHER_MODEL
from trtllm_ct.checkpoint.header import format_names
from trtllm_ct.plan.models.alike_layers import LAYER, Suspects, suspects_of
from trtllm_ct.plan.models.discovery import is_draft, table_names_of
from trtllm_ct.plan.models.layer_kinds import layer_kinds
from trtllm_ct.plan.models.model_class import Comparison
from trtllm_ct.plan.models.plain_tensors import EXPERT, as_class_spells
from trtllm_ct.plan.stated_check import refuse_unlike_row

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.models.discovery import Discovery
    from trtllm_ct.plan.models.expert_spellings import ExpertSpelling
    from trtllm_ct.plan.models.model_class import ModelClass
    from trtllm_ct.plan.models.plain_tensors import PlainTensors
    from trtllm_ct.plan.models.sites import Model

__all__ = ["NOT_ASKED", "class_warnings", "refuse_lost_tensors"]

NOT_ASKED = Comparison(why_not="loaders don't compare with it")
"""The comparison with a class where none was asked for."""

_TABLE = "embed_tokens"
_NO_TENSOR = "no such tensor in any shard"
_OTHER_SIZE = "Fetch the tensor and config.json again from where the checkpoint was published; they don't fit together."


def refuse_lost_tensors(
    tensors: PlainTensors, model: Model, body: str, model_class: ModelClass | None, faults: FaultCollector
) -> Comparison:
    """Add a fault for each tensor that is missing or has another size; return how the class of the model fits.

    `tensors` are those of the whole checkpoint as plain weights, and `body` is the prefix of the text model.
    """
    # The two stacks of an encoder-decoder have numbers of layers of their own.
    count = 0 if model.text.get("is_encoder_decoder") else model.sizes["layers"]
    suspects = suspects_of(tensors, body, layer_kinds(model.text, count), model.parts)
    comparison = NOT_ASKED
    if model_class is not None:
        with_lost = as_class_spells({**tensors, **dict.fromkeys(suspects.lost)}, model.spelling)
        comparison = _unless_renamed(model_class.compare(with_lost))
        if comparison.by:
            comparison = _without_absent(comparison)
            suspects, comparison = _agreed(suspects, comparison, model.spelling)
        if comparison.by and not model.has_row:
            comparison = replace(comparison, renamed=frozenset(_renamed(comparison, with_lost, body, count)))
    if model.has_row and model.discovery is not None and not comparison.by:
        _refuse_lost_ends(tensors, model, model.discovery, faults)
        refuse_unlike_row(tensors, model, model.discovery.place, faults)
    _refuse_suspects(suspects, tensors, model.name, faults)
    _refuse_by_class(comparison, faults)
    return comparison


def _refuse_lost_ends(tensors: PlainTensors, model: Model, found: Discovery, faults: FaultCollector) -> None:
    """Add a fault for each end of a decoder that no file has: embeddings, and a head of its own.

    No layer is like them, and the engine's class would keep memory that nobody wrote.
    """
    body, head = found.place
    inside = {name.removeprefix(body) for name in tensors if name.startswith(body)}
    missing = {}
    # Plain weights may have the names of transformers' class, whatever the engine's reads.
    tables = table_names_of(model.row, usual=model.as_transformers)
    table_name = _TABLE if _TABLE in tables else model.row.embeddings
    # Some writers store the weight of a tied head only under the name of the head.
    is_head = model.tied is not False and f"{head}.weight" in tensors
    if not is_head and not any(f"{table}.weight" in inside for table in tables):
        missing[f"{body}{table_name}.weight"] = "the embeddings"
    if model.tied is False and not model.headless and f"{head}.weight" not in tensors:
        missing[f"{head}.weight"] = (
            "a head of its own, since neither config.json nor the class ties it to the embeddings"
        )
    for name, expected in missing.items():
        faults.add(where=name, expected=expected, found=_NO_TENSOR, remedy=f"{FETCH}.")


def class_warnings(comparison: Comparison) -> tuple[str, ...]:
    """Return warnings about parts of a class that are not stored, or that may be stored under other names."""
    texts = [
        f"{comparison.by} has {part}, but these files have few of its tensors: that part was not compared"
        for part in comparison.absent
    ]
    if comparison.renamed:
        missing, unread = (format_names(sorted(names)) for names in (comparison.renamed, comparison.unread))
        texts.append(f"{comparison.by} has {missing}, which no file has, and no {unread}: the names may differ")
    return tuple(texts)


def _unless_renamed(comparison: Comparison) -> Comparison:
    """Return a comparison; without any result if the files have other names than the class for most of the text model.

    They were written for another class then: as much as the class misses is left unread.
    """
    missing = comparison.text & comparison.missing.keys()
    if 2 * len(missing) <= len(comparison.text) or len(comparison.unread) < len(missing) or not missing:
        return comparison
    return Comparison(why_not=f"{comparison.by} has other names than these files")


def _without_absent(comparison: Comparison) -> Comparison:
    """Return a comparison without the towers of the class of which most parameters are missing.

    A text model may be published without the towers beside it; then modules that lead from them to it, such as a
    projector, are absent too. The text model itself is never absent.
    """
    missing = comparison.missing
    absent = {part: names for part, names in comparison.parts.items() if 2 * len(names & missing.keys()) > len(names)}
    left_out = frozenset().union(*absent.values())
    stored = {_first_module(name) for name in comparison.present}
    others = missing.keys() - comparison.text if absent else ()
    beside = {name: top for name in others if (top := _first_module(name)) and top not in stored}
    left_out |= beside.keys()
    return replace(
        comparison,
        absent=tuple(dict.fromkeys([*absent, *beside.values()])),
        missing={name: shape for name, shape in missing.items() if name not in left_out},
        misfits=tuple(misfit for misfit in comparison.misfits if misfit.name not in left_out),
    )


def _first_module(name: str) -> str:
    """Return the first module in the name of a parameter of another module inside of it; empty without one."""
    first, *inside = name.removeprefix("model.").split(".")
    return first if len(inside) > 1 else ""


def _agreed(suspects: Suspects, comparison: Comparison, spelling: ExpertSpelling) -> tuple[Suspects, Comparison]:
    """Return what layers and class agree on, and what only the class says, each fault in one of them."""
    unfit = {source for misfit in comparison.misfits for source in misfit.sources}
    misshapen = {
        name: shape for name, shape in suspects.misshapen.items() if name in unfit or EXPERT.fullmatch(name) is not None
    }
    layers = {layer: _in_layer(layer, comparison.missing) for layer in suspects.lost_layers}
    known = set().union(*layers.values())
    agreed = replace(
        suspects,
        lost=tuple(name for name in suspects.lost if _spelled(name, spelling) not in comparison.unread),
        misshapen=misshapen,
        lost_layers=tuple(layer for layer, names in layers.items() if names),
        surplus_layers=tuple(layer for layer in suspects.surplus_layers if _in_layer(layer, comparison.unread)),
    )
    return agreed, replace(
        comparison,
        missing={name: shape for name, shape in comparison.missing.items() if name not in known},
        misfits=tuple(misfit for misfit in comparison.misfits if misshapen.keys().isdisjoint(misfit.sources)),
    )


def _spelled(name: str, spelling: ExpertSpelling) -> str:
    """Return the name of a tensor as the class spells it."""
    return next(iter(as_class_spells({name: None}, spelling)))


def _in_layer(layer: str, parameters: Collection[str]) -> frozenset[str]:
    """Return the parameters of one layer; the class may have the layers under another prefix."""
    stack, _, number = layer.rpartition(".")
    leaf = stack.rpartition(".")[2]
    return frozenset(
        name
        for name in parameters
        if (match := LAYER.fullmatch(name)) is not None and (match[1].rpartition(".")[2], match[2]) == (leaf, number)
    )


def _renamed(comparison: Comparison, tensors: PlainTensors, body: str, count: int) -> Iterator[str]:
    """Yield the missing parameters that may be stored under another name.

    No layer has a parameter of such a name, and a tensor of its shape is left unread, whose name has the same word, as
    `final_norm` has that of `norm`. Draft layers are left unread by most classes.
    """
    templates = {_template(name) for name in comparison.present}
    unread = [name for name in comparison.unread if not _drafts(name, body, count)]
    for name, shape in comparison.missing.items():
        if _template(name) in templates:
            continue
        others = (other for other in unread if tensors[other] in {shape, None} and _same_word(name, other))
        taken = next(others, None)
        if taken is not None:
            unread.remove(taken)
            yield name


def _same_word(name: str, other: str) -> bool:
    """Whether the last module of one name has the last module of the other as a part of its name."""
    first, second = (full.split(".")[-2:] for full in (name, other))
    return first[-1] == second[-1] and (first[0] in second[0] or second[0] in first[0])


def _template(name: str) -> str:
    """Return a name with every number in it replaced."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _drafts(name: str, body: str, count: int) -> bool:
    """Whether a tensor belongs to draft layers: under a name of their own, or after the last layer."""
    layer = LAYER.fullmatch(name)
    after = layer is not None and name.startswith(body) and 0 < count <= int(layer[2])
    return is_draft(name) or after


def _refuse_suspects(suspects: Suspects, tensors: PlainTensors, model: str, faults: FaultCollector) -> None:
    """Add the faults of layers and experts that are unlike the others, but not again of what the row says is lost."""
    named = {fault.where for fault in faults.faults}
    expected = f"a tensor that the layers of {model} have"
    for name in (name for name in suspects.lost if name not in named):
        faults.add(where=name, expected=expected, found=_NO_TENSOR, remedy=f"{FETCH}.")
    for name, shape in suspects.misshapen.items():
        expected = f"shape {list(shape)}, as in the other layers or experts of its kind"
        faults.add(where=name, expected=expected, found=f"shape {list(tensors[name] or ())}", remedy=_OTHER_SIZE)
    for name in suspects.lost_layers:
        faults.add(
            where=name,
            expected="a layer, by the number of layers in config.json",
            found=_NO_TENSOR.replace("tensor", "layer"),
            remedy=FETCH_OR_OTHER_MODEL,
        )
    for name in suspects.surplus_layers:
        faults.add(
            where=name,
            expected="no layer of this number, by the number of layers in config.json",
            found="a layer like the ones before it",
            remedy="Take config.json from where the weights were published; it describes another model.",
        )


def _refuse_by_class(comparison: Comparison, faults: FaultCollector) -> None:
    """Add the faults that only the class finds."""
    for name in comparison.missing:
        if name not in comparison.renamed:
            faults.add(where=name, expected=f"a tensor that {comparison.by} has", found=_NO_TENSOR, remedy=f"{FETCH}.")
    for misfit in comparison.misfits:
        faults.add(
            where=misfit.sources[0] if len(misfit.sources) == 1 else misfit.name,
            expected=f"shape {list(misfit.expected)}, as in {comparison.by}",
            found=misfit.found,
            remedy=_OTHER_SIZE,
        )
