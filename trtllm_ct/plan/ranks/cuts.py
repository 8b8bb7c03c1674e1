"""Whether an engine can divide a model by given parallel sizes, and which slices the model's modules then get.

Source: TensorRT-LLM `_torch/modules/attention.py`, `gated_mlp.py`, `embedding.py` and `fused_moe/interface.py`; for
repeated K/V heads `_torch/models/modeling_utils.py` (`duplicate_kv_weight`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.engine.parallel import ONE_RANK, Cut
from trtllm_ct.engine.slices import Slices
from trtllm_ct.plan.models.class_row import entry_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.engine.holdings import Weight
    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.assign import Candidate
    from trtllm_ct.plan.models.sites import Model, Site

__all__ = ["cut_of", "even_sizes", "is_uneven", "refuse_uneven", "repeated_biases", "slices_of", "with_slices"]

_MATRIX = 2
_HEADS = "num_attention_heads"
_EXPERT_SIZE = "intermediate size of experts"
# What messages call a size, by its name in the rows.
_KEYS = {"intermediate": "intermediate_size", "shared_intermediate": "shared_expert_intermediate_size"}
_IN_LAYER = re.compile(r"^(?:.*\.)?layers\.\d+\.")
_LARGEST_SIZE = 16
"""Tensor-parallel sizes that work are searched up to this one, or up to the requested one if that is larger."""


def cut_of(site: Site, parallel: Parallel) -> Cut:
    """Return how ranks divide a module.

    Under attention data parallelism every rank has the whole attention and the whole vocabulary.
    """
    if parallel.attention_dp and (site.attention or site.cut is Cut.VOCABULARY):
        return Cut.NONE
    return site.cut


def with_slices(
    candidates: Mapping[str, Candidate], model: Model, parallel: Parallel, target: Target
) -> Mapping[str, Candidate]:
    """Return the candidates with the slices that their modes must hold."""
    if parallel == ONE_RANK:
        return candidates
    sizes = even_sizes(model, parallel)
    repeats = target.repeats_kv_scales

    # Candidates that share their `Weight` object and have the same slices share the new object too.
    sliced: dict[tuple[int, Slices | None], Weight] = {}
    result = {}
    for name, candidate in candidates.items():
        slices = slices_of(candidate.site, parallel, sizes, repeats_scales=repeats)
        key = (id(candidate.weight), slices)
        if key not in sliced:
            sliced[key] = replace(candidate.weight, slices=slices)
        result[name] = candidate._replace(weight=sliced[key])
    return result


def refuse_uneven(model: Model, parallel: Parallel, faults: FaultCollector, *, repeats_biases: bool = False) -> None:
    """Add a fault for each size of a model that the ranks can't divide evenly, by its key in config.json.

    More pipeline stages than layers, or than the class runs in, are a fault too, and K/V biases that engines would
    repeat wrongly; with `repeats_biases` they are delivered repeated.
    """
    if parallel == ONE_RANK:
        return
    sizes = ", ".join(str(size) for size in even_sizes(model, parallel))
    for key, count, ranks in _divided_parts(model, parallel).uneven(parallel.tensor):
        faults.add(
            where=f"config.json: {key}",
            expected=f"a number that {ranks} ranks can share evenly",
            found=str(count) if count else "no such number",
            remedy=_remedy(sizes)
            if count
            else f"Add {key} to config.json, as the model's class in transformers has it.",
        )
    if model.row.one_stage and parallel.pipeline > 1:
        faults.add(
            where="config.json: architectures",
            expected="a class that runs in several pipeline stages",
            found=f"{model.name}, which refuses more than one",
            remedy="Use a pipeline-parallel size of 1.",
        )
    elif parallel.pipeline > model.layers:
        faults.add(
            where="config.json: num_hidden_layers",
            expected=f"a layer for each of {parallel.pipeline} pipeline stages",
            found=str(model.layers),
            remedy=f"Use a pipeline-parallel size of at most {model.layers}.",
        )
    if not repeats_biases:
        _refuse_repeated_biases(model, parallel, faults)


def _remedy(sizes: str) -> str:
    """Return what to do about a size that ranks can't divide, given the tensor-parallel sizes that work."""
    return f"Tensor-parallel sizes that work: {sizes}." if sizes else "Use another expert-parallel size."


def is_uneven(model: Model, parallel: Parallel) -> bool:
    """Whether the ranks can't divide the model evenly; engines raise an error then."""
    stages = 1 if model.row.one_stage else model.layers
    return parallel.pipeline > stages or bool(_divided_parts(model, parallel).uneven(parallel.tensor))


def _refuse_repeated_biases(model: Model, parallel: Parallel, faults: FaultCollector) -> None:
    """Add a fault for each K or V Linear with a bias, if there are more ranks than K/V heads.

    Engines repeat K/V heads then, but most releases repeat a bias element by element instead of head by head.
    """
    for path in repeated_biases(model, parallel, parallel.tensor):
        faults.add(
            where=f"{path}.bias",
            expected=f"a K/V head for each of {parallel.tensor} ranks: engines repeat its elements instead of heads",
            found=f"{model.kv_heads} heads",
            remedy=f"Use a tensor-parallel size of at most {model.kv_heads}, or attention data parallelism.",
        )


def repeated_biases(model: Model, parallel: Parallel, tensor: int) -> list[str]:
    """Return the K and V Linears with a bias, if a tensor-parallel group of this size has more ranks than K/V heads.

    They are given by their path in a layer.
    """
    return _divided_parts(model, parallel).repeated_biases(tensor)


def slices_of(site: Site, parallel: Parallel, sizes: tuple[int, ...], *, repeats_scales: bool) -> Slices | None:
    """Return the slices that a mode must hold; None if every rank has the whole weight.

    An engine may divide some modules among fewer ranks. The slices are then those for all ranks, because a mode that
    holds the smallest slices also holds larger ones.
    """
    cut = cut_of(site, parallel)
    ranks = parallel.expert_tensor if site.expert else parallel.tensor
    if ranks == 1 or cut is Cut.NONE or (cut is Cut.VOCABULARY and not site.head):
        return None
    return Slices(
        columns=cut is Cut.ROW,
        tensor=parallel.tensor,
        expert=parallel.expert if site.expert else 1,
        parts=site.parts,
        heads=site.heads,
        repeats_scales=repeats_scales,
        alone=not (site.fused or site.expert or site.parts),
        sizes=sizes,
    )


def even_sizes(model: Model, parallel: Parallel) -> tuple[int, ...]:
    """Return the tensor-parallel sizes by which an engine can divide the model, in ascending order.

    The other parallel sizes stay the same.
    """
    parts = _divided_parts(model, parallel)
    sizes = range(parallel.expert, max(_LARGEST_SIZE, parallel.tensor) + 1, parallel.expert)
    return tuple(size for size in sizes if not parts.uneven(size) and not parts.repeated_biases(size))


class _Part(NamedTuple):
    """A number of rows, columns or heads that ranks divide.

    `label` is its key in config.json, or what it is a number of. With `heads` the ranks may repeat what they can't
    divide.
    """

    label: str
    size: int
    heads: bool = False
    expert: bool = False
    attention: bool = False


@dataclass(frozen=True, slots=True)
class _DividedParts:
    """What ranks divide of a model, each size once; `biases` are the K/V heads of biases by path."""

    parts: Mapping[_Part, None]
    experts: int
    expert_ranks: int
    biases: Mapping[str, int]

    def uneven(self, tensor: int) -> list[tuple[str, int, int]]:
        """Return the sizes that a tensor-parallel group of this size can't divide evenly.

        Each is given with its label, and the number of ranks that have to divide it.
        """
        uneven = [("number of experts", self.experts, self.expert_ranks)] if self.experts % self.expert_ranks else []
        heads = False
        for part in self.parts:
            ranks = tensor // self.expert_ranks if part.expert else tensor
            repeated = part.heads and ranks % part.size == 0
            # A number that neither config.json nor a class gives is 0 here.
            even = ranks == 1 or (part.size > 0 and part.size % ranks == 0)
            # What an uneven number of heads does to the sizes of attention is not said again.
            if not even and not repeated and not (part.attention and heads):
                uneven.append((part.label, part.size, ranks))
                heads = heads or part.label == _HEADS
        return uneven

    def repeated_biases(self, tensor: int) -> list[str]:
        """Return the paths of the biases whose K/V heads are fewer than the ranks."""
        return [path for path, heads in self.biases.items() if tensor > heads]


def _divided_parts(model: Model, parallel: Parallel) -> _DividedParts:
    """Return what ranks divide of a model; under attention data parallelism these are routed experts only.

    The Linears that an engine may divide among fewer ranks are left out.
    """
    parts: dict[_Part, None] = {}
    biases: dict[str, int] = {}
    if not parallel.attention_dp:
        parts |= {_Part(key, model.sizes[key]): None for key in (_HEADS, *model.row.divided)}
    sites = list(model.kinds())
    head_dims = {site.module.rpartition(".")[0]: _head_dim(site) for site in sites if site.module.endswith("k_proj")}
    for site in sites:
        if not site.expert and (parallel.attention_dp or site.ranks_vary):
            continue
        parts |= dict.fromkeys(_parts_of(site, model))
        parent, _, leaf = site.module.rpartition(".")
        # Layers may have numbers of heads of their own, which config.json gives under a key of each class.
        # A tower, which the engine's class reads plain, has heads of its own.
        if leaf == "q_proj" and not site.plain and head_dims.get(parent) and len(site.shape) == _MATRIX:
            parts[_Part(f"heads of {leaf}", site.shape[0] // head_dims[parent], attention=True)] = None
        if site.heads and "bias" in site.locals:
            path = _IN_LAYER.sub("", site.module)
            biases[path] = min(site.heads, biases.get(path, site.heads))
    return _DividedParts(parts, model.sizes["experts"], parallel.expert, biases)


def _head_dim(site: Site) -> int:
    """Return the rows of one head of a k_proj; 0 if its rows or its heads are not known."""
    return site.shape[0] // site.heads if site.heads and len(site.shape) == _MATRIX else 0


def _parts_of(site: Site, model: Model) -> Iterator[_Part]:
    """Yield the numbers of a module that ranks divide; those of a Linear that is stored as one are of its parts."""
    leaf = site.module.rpartition(".")[2]
    if site.cut is Cut.KV_HEADS and site.heads:
        yield _Part(f"heads of {leaf}" if model.stated is None else "num_key_value_heads", site.heads, heads=True)
    elif site.cut in {Cut.COLUMN, Cut.ROW} and len(site.shape) == _MATRIX:
        # The numbers of heads in a Linear that is stored as one are in `ClassRow.divided`.
        names = () if site.parts and site.attention else _size_names(site, model)
        for name, count in zip(names, site.parts or (site.shape[site.cut is Cut.ROW],), strict=False):
            label = _EXPERT_SIZE if site.expert else _KEYS.get(name, f"size of {leaf}")
            yield _Part(label, count, expert=site.expert, attention=site.attention)


def _size_names(site: Site, model: Model) -> tuple[str, ...]:
    """Return the names of the sizes that ranks divide of a module; empty names if its row doesn't vouch for them."""
    if model.stated is None:
        return ("",)
    split = entry_of(model.row.splits, site.module)
    return split or (entry_of(model.row.shapes, site.module) or ("", ""))[site.cut is Cut.ROW :]
