"""Whether an engine can divide a model by given parallel sizes, and which slices the model's modules then get.

Source: TensorRT-LLM `_torch/modules/attention.py`, `gated_mlp.py`, `embedding.py` and `fused_moe/interface.py`; for
repeated K/V heads `_torch/models/modeling_utils.py` (`duplicate_kv_weight`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import ONE_RANK, Cut
from trtllm_ct.engine.slices import Slices

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.engine.holdings import Weight
    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.engine.target import Target
    from trtllm_ct.plan.assign import Candidate
    from trtllm_ct.plan.models.discovery import Discovery
    from trtllm_ct.plan.models.sites import Model, Site

__all__ = ["cut_of", "even_sizes", "is_uneven", "refuse_uneven", "repeated_biases", "slices_of", "with_slices"]

_MATRIX = 2
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
        result[name] = replace(candidate, weight=sliced[key])
    return result


def refuse_uneven(model: Model, parallel: Parallel, faults: FaultCollector, *, repeats_biases: bool = False) -> None:
    """Add a fault for each size of a model that the ranks can't divide evenly, by its key in config.json.

    More pipeline stages than layers are a fault too, and K/V biases that engines would repeat wrongly; with
    `repeats_biases` they are delivered repeated.
    """
    if parallel == ONE_RANK:
        return
    sizes = ", ".join(str(size) for size in even_sizes(model, parallel))
    for key, count, ranks in _uneven(model, parallel, parallel.tensor):
        faults.add(
            where=f"config.json: {key}",
            expected=f"a number that {ranks} ranks can share evenly",
            found=str(count) if count else "no such number",
            remedy=_remedy(sizes)
            if count
            else f"Add {key} to config.json, as the model's class in transformers has it.",
        )
    if parallel.pipeline > model.layers:
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
    return parallel.pipeline > model.layers or bool(_uneven(model, parallel, parallel.tensor))


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

    They are given by their path in a layer, or by name where no table has the paths.
    """
    if model.discovery is not None and not parallel.attention_dp:
        return [
            site.module
            for site in model.discovery.sites
            if site.cut is Cut.KV_HEADS and "bias" in site.locals and site.heads and tensor > site.heads
        ]
    if parallel.attention_dp or tensor <= model.kv_heads:
        return []
    attention = model.architecture.attention
    return [site.path for site in attention if site.cut is Cut.KV_HEADS and site.bias in model.biases]


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
    sizes = range(parallel.expert, max(_LARGEST_SIZE, parallel.tensor) + 1, parallel.expert)
    return tuple(
        size for size in sizes if not _uneven(model, parallel, size) and not repeated_biases(model, parallel, size)
    )


def _uneven(model: Model, parallel: Parallel, tensor: int) -> list[tuple[str, int, int]]:
    """Return the sizes that a tensor-parallel group of this size can't divide evenly.

    Each is given as its key in config.json, its value, and the number of ranks that have to divide it.
    """
    if model.discovery is not None:
        return _uneven_sites(model, model.discovery, parallel, tensor)
    sizes, architecture, experts = model.sizes, model.architecture, model.architecture.experts
    shared = [] if parallel.attention_dp else [("num_attention_heads", model.heads, tensor)]
    if not parallel.attention_dp and not _shares_kv_heads(model, tensor):
        shared.append(("num_key_value_heads", model.kv_heads, tensor))
    if not parallel.attention_dp and not architecture.mlp_ranks_vary:
        if experts is None or model.dense_layers:
            shared.append(("intermediate_size", sizes["intermediate"], tensor))
        if experts is not None and any(site.cut is Cut.COLUMN for site in experts.shared):
            shared.append(("shared_expert_intermediate_size", sizes["shared_intermediate"], tensor))
    if experts is not None:
        shared.append(("number of experts", sizes[experts.count], parallel.expert))
        shared.append(("intermediate size of experts", sizes[experts.intermediate], tensor // parallel.expert))
    return [(key, count, ranks) for key, count, ranks in shared if count % ranks]


def _uneven_sites(model: Model, found: Discovery, parallel: Parallel, tensor: int) -> list[tuple[str, int, int]]:
    """Return the sizes of a model's modules that a tensor-parallel group of this size can't divide evenly.

    Each is given as the last part of the module's name or as its key in config.json, its value, and the number of ranks
    that have to divide it.
    """
    uneven: dict[tuple[str, int, int], None] = {}
    if model.row is not None and not parallel.attention_dp:
        divided = ((key, model.sizes[key], tensor) for key in model.row.divided)
        # A number that neither config.json nor a class gives is 0 here.
        uneven |= {size: None for size in divided if tensor > 1 and (size[1] % tensor or not size[1])}
    if found.experts % parallel.expert:
        uneven["number of experts", found.experts, parallel.expert] = None
    for site in found.sites:
        if len(site.shape) != _MATRIX or (parallel.attention_dp and site.attention):
            continue
        ranks = tensor // parallel.expert if site.expert else tensor
        leaf = site.module.rpartition(".")[2]
        if site.cut is Cut.KV_HEADS and site.heads and site.heads % ranks and ranks % site.heads:
            uneven[f"heads of {leaf}", site.heads, ranks] = None
        elif site.cut in {Cut.COLUMN, Cut.ROW} and site.shape[site.cut is Cut.ROW] % ranks:
            uneven[f"size of {leaf}", site.shape[site.cut is Cut.ROW], ranks] = None
    return list(uneven)


def _shares_kv_heads(model: Model, tensor: int) -> bool:
    """Whether the ranks can divide the K/V heads evenly, or can repeat each head for the same number of ranks."""
    cuts = {site.cut for site in model.architecture.attention}
    if Cut.KV_HEADS in cuts:
        return model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0
    stored_as_one = any("kv_heads" in site.parts for site in model.architecture.attention)
    return not stored_as_one or model.kv_heads % tensor == 0
