"""What a rank is handed is its slice of the whole, and what it reads is not much more than that.

The slices are taken here as an engine takes them: equal rows of column-cut Linears, whole heads of K and V, the rest as
it is. Nothing of the planner's is used for that but the site's kind of cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import write_checkpoint
from stored_schemes import SCHEMES
from tiny_models import tiny_config

from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.pipeline import open_checkpoint, stream_delivered
from trtllm_ct.plan.narrow import row_unit
from trtllm_ct.plan.parallel import Cut, Parallel, Rank
from trtllm_ct.plan.shard import plan_for_rank

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.pipeline import Checkpoint
    from trtllm_ct.plan.model import Plan

SIZES = range(1, 9)
COLUMN_CUT = {Cut.COLUMN, Cut.KV_HEADS}


def config_for(heads: int, unit: int = 128, **more: Any) -> dict[str, Any]:
    """A model that `heads` ranks can share, and with 8 heads 1, 2 and 4 too; columns are multiples of `unit`."""
    head_dim = max(32, unit // 2) if heads == 8 else unit
    sizes = {"hidden": unit, "heads": heads, "kv_heads": heads, "intermediate": heads * unit}
    return tiny_config(**{"layers": 1, "vocabulary": 840, **sizes, "head_dim": head_dim, **more})


def checkpoints(folder: Path, scheme: str) -> dict[int, Checkpoint]:
    """By tensor-parallel size from 1 to 8, a checkpoint that so many ranks can share."""
    made = {}
    unit = next((size for size in (256, 128) if f"g{size}" in scheme or (scheme, size) == ("fp8-block", 128)), 64)
    for heads in (8, 3, 5, 6, 7):
        built = write_checkpoint(folder / str(heads), config=config_for(heads, unit), scheme=scheme)
        made[heads] = open_checkpoint(built.directory)
    return {tensor: made[8 if 8 % tensor == 0 else tensor] for tensor in SIZES}


def delivered(checkpoint: Checkpoint, plan: Plan) -> dict[str, dict[str, Tensor]]:
    """By module, then by name; and what is handed over really is what the plan says."""
    return {module.name: tensors for module, tensors in stream_delivered(plan, checkpoint.catalog)}


def ranks_of(parallel: Parallel) -> list[Rank]:
    return [Rank(parallel=parallel, tensor=rank) for rank in range(parallel.tensor)]


def cuts(checkpoint: Checkpoint, plan: Plan) -> dict[str, Cut]:
    place = checkpoint.model.place(plan.by_name)
    return {site.module: site.cut for site in checkpoint.model.sites(place)}


def own_rows(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """An engine's slice along the first axis; one number is everybody's."""
    if tensor.dim() == 0 or tensor.shape[0] == 1:
        return tensor
    assert tensor.shape[0] % ranks == 0, tensor.shape
    return tensor.chunk(ranks)[rank]


def same(one: Tensor, other: Tensor) -> bool:
    octets = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*octets)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_have_the_slices_of_the_whole_and_read_no_more(tmp_path: Path, scheme: str) -> None:
    """For every size, as the target inside of the engine delivers it; the bytes are measured in the reader."""
    counted = 0
    for tensor, checkpoint in checkpoints(tmp_path, scheme).items():
        plan = checkpoint.plan("tensorrt_llm", parallel=Parallel(tensor=tensor))
        whole, cut = delivered(checkpoint, plan), cuts(checkpoint, plan)
        for rank in ranks_of(plan.parallel):
            own = plan_for_rank(plan, checkpoint.model, rank)
            assert_slices(delivered(checkpoint, own), whole, cut, rank)
            counted += assert_share(plan, bytes_read_by(checkpoint, own), cut, tensor)
    assert counted >= sum(SIZES)


def assert_slices(
    handed: dict[str, dict[str, Tensor]], whole: dict[str, dict[str, Tensor]], cut: dict[str, Cut], rank: Rank
) -> None:
    """Each rank's rows are those of the whole, in a tensor of its shape."""
    assert handed.keys() == whole.keys()
    for module, tensors in handed.items():
        ranks = rank.parallel.tensor if cut.get(module) in {*COLUMN_CUT, Cut.VOCABULARY} else 1
        for name, found in tensors.items():
            assert found.shape == whole[module][name].shape, name
            mine = own_rows(found, rank.tensor % ranks, ranks)
            assert same(mine, own_rows(whole[module][name], rank.tensor % ranks, ranks)), (name, rank)


def assert_share(plan: Plan, bytes_read: Iterator[tuple[str, int]], cut: dict[str, Cut], tensor: int) -> int:
    """At most 1 / tp of the bytes and one percent, where slices are whole blocks and words; how many Linears it was."""
    measured = whole = counted = 0
    for module, read in bytes_read:
        own = plan.module(module)
        if own.weight is None or cut.get(module) not in COLUMN_CUT:
            continue
        if own.weight.shape[0] // tensor % row_unit(own):
            # Slices that begin inside of a block of scales: no mode holds them, and blocks are read whole.
            assert own.dequantized
            continue
        # An index of columns is read by every rank: none of its elements belongs to a row.
        index = own.views["weight_g_idx"].stored_bytes if "weight_g_idx" in own.views else 0
        measured, whole = measured + read - index, whole + own.stored_bytes - index
        counted += 1
    assert measured <= (1 / tensor + 0.01) * whole
    return counted


def bytes_read_by(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[str, int]]:
    """Each module of a plan, and what the reader was asked for it."""
    with TensorReader(checkpoint.catalog) as reader:
        before = reader.bytes_read
        for module, _ in stream_delivered(plan, checkpoint.catalog, reader=reader):
            yield module.name, reader.bytes_read - before
            before = reader.bytes_read


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int8-channel", "fp8-channel-token", "nvfp4"])
def test_ranks_that_outnumber_kv_heads_get_whole_heads_with_their_scales(tmp_path: Path, scheme: str) -> None:
    """What engines repeat by themselves comes as it is stored; other tensors have the rows of a head for each rank."""
    config = tiny_config(layers=1, hidden=256, heads=8, kv_heads=2, intermediate=256, vocabulary=64)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config, scheme=scheme).directory)
    parallel = Parallel(tensor=4)
    plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
    whole = delivered(checkpoint, plan)
    for rank in ranks_of(parallel):
        handed = delivered(checkpoint, plan_for_rank(plan, checkpoint.model, rank))
        for module in ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"):
            for name, found in handed[module].items():
                want = own_rows(whole[module][name], rank.tensor // 2, 2)
                repeated = found.dim() > 0 and found.shape[0] == 2 * whole[module][name].shape[0]
                ranks, own = (4, rank.tensor) if repeated else (2, rank.tensor // 2)
                assert same(own_rows(found, own, ranks), want), (name, rank.tensor)


def test_layers_of_other_stages_are_not_read(tmp_path: Path) -> None:
    config = config_for(8, layers=4)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config, scheme="int4-g32").directory)
    parallel = Parallel(pipeline=2)
    plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
    own = plan_for_rank(plan, checkpoint.model, Rank(parallel=parallel, pipeline=1, layers=(2, 3)))

    read = {run.name for module in own.modules for run in module.runs if run.end != run.begin}

    assert not any(".layers.0." in name or ".layers.1." in name for name in read)
    assert any(".layers.2." in name for name in read)
    assert "lm_head.weight" in read


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8-tensor-static", "int8-channel"])
def test_experts_of_other_ranks_are_not_read(tmp_path: Path, scheme: str) -> None:
    """But for the few scalars that an engine takes the largest of, over all experts."""
    config = tiny_config("MixtralForCausalLM", layers=1, hidden=128, heads=4, kv_heads=4, intermediate=128)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config, scheme=scheme).directory)
    parallel = Parallel(tensor=2, expert=2)
    plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
    for rank, (mine, others) in enumerate(((("0", "1"), ("2", "3")), (("2", "3"), ("0", "1")))):
        own = plan_for_rank(plan, checkpoint.model, Rank(parallel=parallel, tensor=rank, expert=rank))
        sizes = {run.name: (run.end, run.begin) for module in own.modules for run in module.runs}
        bulky = [name for name in sizes if "weight" in name.rpartition(".")[2] and "scale" not in name]
        assert all(any(f".experts.{expert}." in name for name in bulky) for expert in mine)
        assert not any(
            f".experts.{expert}." in name and sizes[name][0] != sizes[name][1] for expert in others for name in bulky
        )


def test_sizes_of_another_plan_are_a_mistake(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config_for(8)).directory)
    plan = checkpoint.plan("tensorrt_llm", parallel=Parallel(tensor=2))

    with pytest.raises(AssertionError, match="tensor=2"):
        plan_for_rank(plan, checkpoint.model, Rank())
