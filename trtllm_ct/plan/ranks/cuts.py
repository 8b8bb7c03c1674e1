"""What parallel sizes mean for a model: whether an engine can cut it by them, and which slices its modules get.

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
    from trtllm_ct.plan.models.families import LinearSite
    from trtllm_ct.plan.models.sites import Model, Site

__all__ = ["cut_of", "refuse_uneven", "with_slices"]

_LARGEST_SIZE = 16
"""Sizes that would work are looked for up to here, or up to the one that was asked for."""


def cut_of(site: Site, parallel: Parallel) -> Cut:
    """How ranks share a module; under attention data parallelism each has all of attention and of the vocabulary."""
    if parallel.attention_dp and (site.attention or site.cut is Cut.VOCABULARY):
        return Cut.NONE
    return site.cut


def with_slices(
    candidates: Mapping[str, Candidate], model: Model, parallel: Parallel, target: Target
) -> Mapping[str, Candidate]:
    """The candidates with the slices that their modes must hold."""
    if parallel == ONE_RANK:
        return candidates
    sizes = _even_sizes(model, parallel)
    repeats = target.repeats_kv_scales

    # Those that share their `Weight` and are cut alike share the new one too.
    cut: dict[tuple[int, Slices | None], Weight] = {}
    found = {}
    for name, own in candidates.items():
        slices = _slices_of(own.site, parallel, sizes, repeats_scales=repeats)
        kind = (id(own.weight), slices)
        if kind not in cut:
            cut[kind] = replace(own.weight, slices=slices)
        found[name] = replace(own, weight=cut[kind])
    return found


def refuse_uneven(model: Model, parallel: Parallel, faults: FaultCollector) -> None:
    """Add a fault for everything in a model that ranks of these sizes can't share, by its key in config.json."""
    if parallel == ONE_RANK:
        return
    sizes = ", ".join(str(size) for size in _even_sizes(model, parallel))
    for key, count, ranks in _uneven(model, parallel, parallel.tensor):
        faults.add(
            where=f"config.json: {key}",
            expected=f"a number that {ranks} ranks can share evenly",
            found=str(count),
            remedy=f"Tensor-parallel sizes that work: {sizes}." if sizes else "Use another expert-parallel size.",
        )
    if parallel.pipeline > model.layers:
        faults.add(
            where="config.json: num_hidden_layers",
            expected=f"a layer for each of {parallel.pipeline} pipeline stages",
            found=str(model.layers),
            remedy=f"Use a pipeline-parallel size of at most {model.layers}.",
        )
    _refuse_repeated_biases(model, parallel, faults)


def _refuse_repeated_biases(model: Model, parallel: Parallel, faults: FaultCollector) -> None:
    """Ranks that outnumber K/V heads get repeated ones, and most releases repeat a bias element by element then."""
    for site in _repeated_biases(model, parallel, parallel.tensor):
        faults.add(
            where=f"{site.path}.bias",
            expected=f"a K/V head for each of {parallel.tensor} ranks: engines repeat its elements instead of heads",
            found=f"{model.kv_heads} heads",
            remedy=f"Use a tensor-parallel size of at most {model.kv_heads}, or attention data parallelism.",
        )


def _repeated_biases(model: Model, parallel: Parallel, tensor: int) -> list[LinearSite]:
    """The K and V Linears with a bias, where a group of that size has more ranks than there are heads."""
    if parallel.attention_dp or tensor <= model.kv_heads:
        return []
    return [site for site in model.architecture.attention if site.cut is Cut.KV_HEADS and site.bias in model.biases]


def _slices_of(site: Site, parallel: Parallel, sizes: tuple[int, ...], *, repeats_scales: bool) -> Slices | None:
    """The slices that a mode must hold; None where every rank has all of the weight.

    Where an engine may cut for fewer ranks, these are the slices for all of them: what holds the smallest slices holds
    larger ones.
    """
    cut = cut_of(site, parallel)
    ranks = parallel.expert_tensor if site.expert else parallel.tensor
    if ranks == 1 or cut in {Cut.NONE, Cut.VOCABULARY}:
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


def _even_sizes(model: Model, parallel: Parallel) -> tuple[int, ...]:
    """The tensor-parallel sizes, in ascending order, by which an engine can cut the model, all else as it is."""
    sizes = range(parallel.expert, max(_LARGEST_SIZE, parallel.tensor) + 1, parallel.expert)
    return tuple(
        size for size in sizes if not _uneven(model, parallel, size) and not _repeated_biases(model, parallel, size)
    )


def _uneven(model: Model, parallel: Parallel, tensor: int) -> list[tuple[str, int, int]]:
    """What a group of that size can't share: its key in config.json, its value, and the ranks among which it goes."""
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


def _shares_kv_heads(model: Model, tensor: int) -> bool:
    """Whether K/V heads go evenly among ranks, or ranks among heads where engines repeat them."""
    cuts = {site.cut for site in model.architecture.attention}
    if Cut.KV_HEADS in cuts:
        return model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0
    stored_as_one = any("kv_heads" in site.parts for site in model.architecture.attention)
    return not stored_as_one or model.kv_heads % tensor == 0
