"""What a rank is handed is its slice of the whole, and what it reads is that slice and not much more.

The slices are taken here as an engine takes them, from the names of modules alone: equal rows of column-cut Linears,
equal columns of row-cut ones, rows of the vocabulary by ceiling division, experts one by one. Nothing of the planner's
is used for that. What a rank has no use for is overwritten with 0xff in the files that it reads: NaN as a scale of any
kind, and codes of -1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import rewrite, write_checkpoint
from fused_experts import fuse_experts
from on_tensors import stream_delivered
from stored_schemes import SCHEMES
from tiny_models import tiny_config

from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.engine.parallel import Parallel, Rank
from trtllm_ct.formats.sparse.compressed_io import save_compressed
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.ranks.shard import plan_for_rank

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.plan import ModulePlan, Plan

SIZES = range(1, 9)
FILE = "model.safetensors"
COLUMN_CUT = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3"}
ROW_CUT = {"o_proj", "down_proj", "w2"}
TABLES = {"embed_tokens", "lm_head"}
PER_WEIGHT = {"weight_shape", "weight_g_idx"}
LAYER = re.compile(r"model\.layers\.(\d+)\.")
EXPERT = re.compile(r".*\.experts\.(\d+)\.")
QWEN = "Qwen3MoeForCausalLM"

Tensors = dict[str, dict[str, "Tensor"]]
"""By module, then by full name."""


def unit_of(scheme: str) -> int:
    """A number of columns that are whole groups or blocks, for 64 bytes of codes at least."""
    return next((size for size in (256, 128) if f"g{size}" in scheme or (scheme, size) == ("fp8-block", 128)), 64)


def config_for(heads: int, unit: int = 128, **more: Any) -> dict[str, Any]:
    """Return a model that `heads` ranks can divide (with 8 heads also 1, 2 and 4); columns are multiples of `unit`."""
    head_dim = max(32, unit // 2) if heads == 8 else unit
    sizes = {"hidden": unit, "heads": heads, "kv_heads": heads, "intermediate": heads * unit}
    # 101 rows are shared by ceiling division: the last rank has fewer, and of 8 ranks it has 10.
    return tiny_config(**{"layers": 1, "vocabulary": 101, **sizes, "head_dim": head_dim, **more})


def ranks_of(parallel: Parallel, layers: int = 1) -> Iterator[Rank]:
    """All ranks of an engine: stages have equal numbers of layers, and expert ranks are neighbours."""
    each = layers // parallel.pipeline
    for stage in range(parallel.pipeline):
        for tensor in range(parallel.tensor):
            yield Rank(
                parallel=parallel,
                tensor=tensor,
                pipeline=stage,
                expert=tensor % parallel.expert,
                layers=tuple(range(stage * each, (stage + 1) * each)),
            )


def part_of(module: str, rank: Rank, experts: int = 1) -> tuple[int, int] | None:
    """Return the rank's part of a module as (index, number of equal parts); None if other ranks have it."""
    layer, expert, sizes = LAYER.match(module), EXPERT.match(module), rank.parallel
    if layer and rank.layers is not None and int(layer[1]) not in rank.layers:
        # The norm before the next stage is computed with the end of this one.
        used = module.endswith(".input_layernorm") and int(layer[1]) - 1 in rank.layers
        return (0, 1) if used else None
    if expert:
        used = int(expert[1]) // (experts // sizes.expert) == rank.expert
        return (rank.tensor // sizes.expert, sizes.tensor // sizes.expert) if used else None
    leaf = module.rpartition(".")[2]
    if leaf in TABLES and rank.pipeline != (0 if leaf == "embed_tokens" else sizes.pipeline - 1):
        return None
    return (rank.tensor, sizes.tensor) if leaf in COLUMN_CUT | ROW_CUT | TABLES else (0, 1)


def sliced(module: str, local: str, tensor: Tensor, part: tuple[int, int]) -> tuple[Tensor, int | None]:
    """Return the engine's slice of a delivered tensor and its axis; None if every rank has the whole tensor."""
    index, parts = part
    leaf = module.rpartition(".")[2]
    if parts == 1 or tensor.numel() == 1:
        return tensor, None
    if leaf in TABLES:
        size = -(-tensor.shape[0] // parts)
        return tensor[index * size : (index + 1) * size], 0
    if leaf in ROW_CUT and tensor.dim() == 1 and local != "pre_quant_scale":
        return tensor, None
    axis = tensor.dim() - 1 if leaf in ROW_CUT else 0
    assert tensor.shape[axis] % parts == 0, (module, local, tensor.shape)
    return tensor.chunk(parts, axis)[index], axis


def used_rows(module: str, rows: int, part: tuple[int, int] | None) -> tuple[float, float]:
    """Where the rows that a rank uses begin and end, among `rows` of them; row-cut weights are read whole."""
    leaf = module.rpartition(".")[2]
    if part is None:
        return 0, 0
    if leaf in TABLES:
        size = -(-rows // part[1])
        return min(part[0] * size, rows), min((part[0] + 1) * size, rows)
    return (part[0] * rows / part[1], (part[0] + 1) * rows / part[1]) if leaf in COLUMN_CUT else (0, rows)


@dataclass
class Source:
    """A checkpoint, what it delivers to one rank, and copies of it that are spoilt for all but one rank."""

    checkpoint: Checkpoint
    experts: int = 1

    @cached_property
    def payload(self) -> bytes:
        return (self.checkpoint.directory / FILE).read_bytes()

    @cached_property
    def one_rank(self) -> tuple[Plan, Tensors]:
        plan = self.checkpoint.plan("tensorrt_llm")
        return plan, delivered(self.checkpoint, plan)

    @cached_property
    def dense(self) -> Tensors:
        return delivered(self.checkpoint, self.checkpoint.plan("dense"))

    def whole(self, module: ModulePlan) -> dict[str, Tensor]:
        """A module as the plan of one rank delivers it, in the mode that it has at other sizes."""
        plan, tensors = self.one_rank
        mode, name = plan.module(module.name).delivered_mode, module.name
        if module.dequantized:
            return self.dense[name]
        if module.delivered_mode == mode:
            return tensors[name]
        # Scales that are repeated so that every rank has whole groups.
        finer = int(mode.rpartition("g")[2]) // int(module.delivered_mode.rpartition("g")[2])
        per_group = (f"{name}.weight_scale", f"{name}.weight_zero")
        return {
            full: tensor.repeat_interleave(finer, 1) if full in per_group else tensor
            for full, tensor in tensors[name].items()
        }

    def spoilt_for_all_but(self, rank: Rank, folder: Path) -> Checkpoint:
        """The same checkpoint, already planned, over files in which nothing is left that only other ranks use."""
        folder.mkdir(exist_ok=True)
        octets = bytearray(self.payload)
        for name, tensor in self.checkpoint.catalog.tensors.items():
            module, _, local = name.rpartition(".")
            # Engines read some single numbers of all experts.
            if local in PER_WEIGHT or tensor.spec.numel == 1:
                continue
            rows = tensor.spec.shape[0]
            per_row = tensor.spec.nbytes // rows
            begin, end = used_rows(module, rows, part_of(module, rank, self.experts))
            for first, last in ((0, int(begin)), (-int(-end // 1), rows)):
                lost = slice(tensor.offset + first * per_row, tensor.offset + last * per_row)
                octets[lost] = b"\xff" * (lost.stop - lost.start)
        (folder / FILE).unlink(missing_ok=True)
        (folder / FILE).write_bytes(octets)
        return replace(self.checkpoint, catalog=replace(self.checkpoint.catalog, source=Folder(folder)))


def delivered(checkpoint: Checkpoint, plan: Plan) -> Tensors:
    return {module.name: tensors for module, tensors in stream_delivered(plan, checkpoint.catalog)}


def measured(checkpoint: Checkpoint, plan: Plan) -> Iterator[tuple[ModulePlan, dict[str, Tensor], int]]:
    """Each module of a plan, what it delivers, and the bytes that the reader was asked for it.

    One worker: more would have modules read ahead.
    """
    with TensorReader(checkpoint.catalog) as reader:
        before = reader.bytes_read
        for module, tensors in stream_delivered(plan, checkpoint.catalog, reader=reader, workers=1):
            yield module, tensors, reader.bytes_read - before
            before = reader.bytes_read


def same(one: Tensor, other: Tensor) -> bool:
    data = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*data)


def concatenated(parts: list[tuple[Tensor, int | None]]) -> Tensor:
    """Return the concatenated slices of all ranks; a tensor that every rank has whole must be equal for all."""
    first, axis = parts[0]
    if axis is not None:
        slices = [part.view(torch.uint8) if part.dtype.itemsize == 1 else part for part, _ in parts]
        return torch.cat(slices, axis).view(first.dtype)
    assert all(same(part, first) for part, _ in parts)
    return first


def assert_slices_make_the_whole(
    source: Source, parallel: Parallel, folder: Path, layers: int = 1
) -> dict[str, list[int]]:
    """Check that every tensor is made of the ranks' slices, with only the rank's bytes in the files.

    Returns the number of bytes that each rank read, by module.
    """
    plan = source.checkpoint.plan("tensorrt_llm", parallel=parallel)
    found: dict[str, dict[str, dict[tuple[int, int], tuple[Tensor, int | None]]]] = {
        module.name: defaultdict(dict) for module in plan.modules
    }
    bytes_read = defaultdict(list)
    for rank in ranks_of(parallel, layers):
        spoilt = source.spoilt_for_all_but(rank, folder)
        shard = plan_for_rank(plan, source.checkpoint.model, rank)
        for module, tensors, read in measured(spoilt, shard):
            part = part_of(module.name, rank, source.experts)
            if part is None:
                assert_nothing_of_others(module, tensors, read)
                continue
            bytes_read[module.name].append(read)
            for name, tensor in tensors.items():
                mine, axis = sliced(module.name, name.rpartition(".")[2], tensor, part)
                found[module.name][name].setdefault(part, (mine.clone(), axis))
    for name, tensors in found.items():
        whole = source.whole(plan.module(name))
        assert tensors.keys() == whole.keys()
        for local, parts in tensors.items():
            assert same(concatenated([parts[part] for part in sorted(parts)]), whole[local]), local
    return bytes_read


def assert_nothing_of_others(module: ModulePlan, tensors: dict[str, Tensor], read: int) -> None:
    """No byte is read of another stage's table, and only single numbers of another rank's expert."""
    if module.name.rpartition(".")[2] in TABLES:
        assert read == 0
        return
    assert EXPERT.match(module.name)
    assert {tensor.numel() for tensor in tensors.values()} == {1}
    assert read <= 3 * 4


def assert_share(source: Source, bytes_read: dict[str, list[int]], tensor: int, block: int) -> int:
    """Check that a rank reads at most 1 / tp + 1 % of the bytes of Linears that are sliced along N.

    Returns how many Linears of ranks were counted.
    """
    plan, _ = source.one_rank
    total = [0] * tensor
    whole = counted = 0
    for name, read in bytes_read.items():
        module = plan.module(name)
        if name.rpartition(".")[2] not in COLUMN_CUT or module.weight is None:
            continue
        rows = module.weight.shape[0] // tensor
        if rows % block:
            # Slices that begin inside of a block of scales, which is read as a whole.
            assert max(read) <= module.stored_bytes * (rows // block + 2) * block / module.weight.shape[0]
            continue
        # An index of columns is read by every rank: none of its elements belongs to a row.
        index = module.views["weight_g_idx"].stored_bytes if "weight_g_idx" in module.views else 0
        assert len(read) == tensor
        total = [before + count - index for before, count in zip(total, read, strict=True)]
        whole += module.stored_bytes - index
        counted += tensor
    assert max(total) <= (1 / tensor + 0.01) * whole
    return counted


@pytest.mark.parametrize("scheme", SCHEMES)
def test_slices_of_all_ranks_are_the_whole_at_every_size_and_no_rank_reads_another_slice(
    tmp_path: Path, scheme: str
) -> None:
    """Tensor parallel 1 to 8, as the target inside of the engine delivers it; the bytes are measured in the reader."""
    block = 128 if scheme == "fp8-block" else 1
    counted = 0
    for heads, sizes in ((8, (1, 2, 4, 8)), (6, (3, 6)), (5, (5,)), (7, (7,))):
        built = write_checkpoint(tmp_path / str(heads), config=config_for(heads, unit_of(scheme)), scheme=scheme)
        source = Source(open_checkpoint(built.directory))
        for tensor in sizes:
            bytes_read = assert_slices_make_the_whole(source, Parallel(tensor=tensor), tmp_path / "spoilt")
            counted += assert_share(source, bytes_read, tensor, block)
    assert counted >= (5 if block == 1 else 2) * sum(SIZES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stages_and_expert_ranks_make_the_whole_and_no_rank_reads_another_slice(tmp_path: Path, scheme: str) -> None:
    """Two stages of two expert ranks, and each expert cut in two among four."""
    unit = max(unit_of(scheme), 128)
    sizes = {"layers": 2, "hidden": unit, "heads": 4, "kv_heads": 4, "intermediate": unit, "vocabulary": 35}
    config = tiny_config(QWEN, **sizes, moe_intermediate_size=unit, num_experts=2)
    built = write_checkpoint(tmp_path / "whole", config=config, scheme=scheme)
    source = Source(open_checkpoint(built.directory), experts=2)
    for parallel in (Parallel(tensor=2, pipeline=2, expert=2), Parallel(tensor=4, pipeline=2, expert=2)):
        assert_slices_make_the_whole(source, parallel, tmp_path / "spoilt", layers=2)


class TestRepeatedHeads:
    """Ranks that outnumber K/V heads: each head serves several of them."""

    HEADS, KV_HEADS = 8, 2

    @classmethod
    def as_the_engine_repeats(cls, local: str, tensor: Tensor, ranks: int, mode: str) -> Tensor:
        """Repeat whole heads of weights, and of the group scales of NVFP4; other tensors are unchanged."""
        by_engine = {"weight"} | ({"weight_scale"} if "NVFP4" in mode else set())
        if local not in by_engine:
            return tensor
        return (
            tensor.reshape(cls.KV_HEADS, -1, tensor.shape[1]).repeat_interleave(ranks // cls.KV_HEADS, 0).flatten(0, 1)
        )

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_each_rank_has_whole_heads_with_every_companion_of_their_rows(self, tmp_path: Path, scheme: str) -> None:
        unit = unit_of(scheme)
        head_dim = 128 if scheme == "fp8-block" else 32
        sizes = {"layers": 1, "hidden": unit, "heads": self.HEADS, "kv_heads": self.KV_HEADS, "intermediate": 8 * unit}
        config = tiny_config(**sizes, vocabulary=16, head_dim=head_dim)
        built = write_checkpoint(tmp_path / "whole", config=config, scheme=scheme)
        source = Source(open_checkpoint(built.directory))
        for tensor in (4, 8):
            plan = source.checkpoint.plan("tensorrt_llm", parallel=Parallel(tensor=tensor))
            for rank in ranks_of(plan.parallel):
                shard = plan_for_rank(plan, source.checkpoint.model, rank)
                handed = delivered(source.checkpoint, shard)
                for leaf in ("k_proj", "v_proj"):
                    module = plan.module(f"model.layers.0.self_attn.{leaf}")
                    self.assert_head(module, handed[module.name], source.whole(module), rank)

    def assert_head(self, module: ModulePlan, handed: dict[str, Tensor], whole: dict[str, Tensor], rank: Rank) -> None:
        ranks = rank.parallel.tensor
        head = rank.tensor * self.KV_HEADS // ranks
        assert handed.keys() == whole.keys()
        for name, tensor in handed.items():
            if whole[name].numel() == 1:
                assert same(tensor, whole[name])
                continue
            local = name.rpartition(".")[2]
            repeated = self.as_the_engine_repeats(local, tensor, ranks, module.delivered_mode)
            assert repeated.shape[0] * self.KV_HEADS == whole[name].shape[0] * ranks, name
            assert same(repeated.chunk(ranks)[rank.tensor], whole[name].chunk(self.KV_HEADS)[head]), name

    @pytest.mark.parametrize("scheme", ["int4-g32", "fp8-channel-token", "nvfp4", "int4-g64-asym"])
    def test_nothing_of_another_head_is_read(self, tmp_path: Path, scheme: str) -> None:
        config = tiny_config(layers=1, hidden=128, heads=8, kv_heads=2, head_dim=32, vocabulary=16)
        built = write_checkpoint(tmp_path, config=config, scheme=scheme)
        checkpoint = open_checkpoint(built.directory)
        plan = checkpoint.plan("tensorrt_llm", parallel=Parallel(tensor=8))
        for rank in ranks_of(plan.parallel):
            shard = plan_for_rank(plan, checkpoint.model, rank)
            read = {module.name: count for module, _, count in measured(checkpoint, shard)}
            for leaf in ("k_proj", "v_proj"):
                module = plan.module(f"model.layers.0.self_attn.{leaf}")
                assert read[module.name] <= 0.51 * module.stored_bytes


class TestVocabulary:
    @pytest.mark.parametrize(("rows", "ranks"), [(5, 4), (1, 2), (3, 8), (96, 1)])
    def test_with_fewer_rows_than_ranks_some_ranks_have_none(self, tmp_path: Path, rows: int, ranks: int) -> None:
        config = config_for(8, vocabulary=rows)
        source = Source(open_checkpoint(write_checkpoint(tmp_path / "whole", config=config).directory))
        bytes_read = assert_slices_make_the_whole(source, Parallel(tensor=ranks), tmp_path / "spoilt")
        for table in TABLES:
            (read,) = [sizes for name, sizes in bytes_read.items() if name.endswith(table)]
            assert sum(read) == rows * config["hidden_size"] * 2
            assert max(read) == -(-rows // ranks) * config["hidden_size"] * 2

    def test_a_tied_table_is_read_by_both_ends_of_the_pipeline(self, tmp_path: Path) -> None:
        config = config_for(8, layers=3, tied=True, vocabulary=96)
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config).directory)
        parallel = Parallel(pipeline=3)
        plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
        read = []
        for rank in ranks_of(parallel, layers=3):
            shard = plan_for_rank(plan, checkpoint.model, rank)
            read += [count for module, _, count in measured(checkpoint, shard) if module.name == "model.embed_tokens"]
        whole = 96 * config["hidden_size"] * 2
        assert read == [whole, 0, whole]

    def test_a_quantized_head_is_dequantized_by_the_last_stage_only(self, tmp_path: Path) -> None:
        """It is dequantized, so it can't be delivered as a view of a file."""
        config = config_for(8, layers=2, vocabulary=96)
        scheme = {"lm_head": "int8-channel", "q_proj": "int8-channel"}
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config, scheme=scheme).directory)
        parallel = Parallel(pipeline=2)
        plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
        first, last = (plan_for_rank(plan, checkpoint.model, rank) for rank in ranks_of(parallel, layers=2))

        assert first.module("lm_head").deliveries == first.module("lm_head").reads == ()
        assert delivered(checkpoint, last)["lm_head"]["lm_head.weight"].dtype is torch.bfloat16


class TestStages:
    def test_a_layer_is_in_one_stage_and_its_first_norm_in_the_stage_before_too(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config_for(8, layers=4)).directory)
        parallel = Parallel(pipeline=4)
        plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
        stages = [plan_for_rank(plan, checkpoint.model, rank) for rank in ranks_of(parallel, layers=4)]

        for layer in range(4):
            for module in (name for name in plan.by_name if f".layers.{layer}." in name):
                having = [stage for stage, shard in enumerate(stages) if module in shard.by_name]
                entrance = layer > 0 and module.endswith(".input_layernorm")
                assert having == ([layer - 1, layer] if entrance else [layer]), module

    def test_stages_have_the_layers_that_the_engine_gives(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config_for(8, layers=3)).directory)
        parallel = Parallel(pipeline=2)
        plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
        shard = plan_for_rank(plan, checkpoint.model, Rank(parallel=parallel, pipeline=1, layers=(2,)))

        numbers = {int(found[1]) for module in shard.modules if (found := LAYER.match(module.name))}
        assert numbers == {2}

    def test_the_modules_of_a_rank_have_the_order_of_the_whole_plan(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config_for(8, layers=4)).directory)
        parallel = Parallel(tensor=2, pipeline=2)
        plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
        for rank in ranks_of(parallel, layers=4):
            names = list(plan_for_rank(plan, checkpoint.model, rank).by_name)
            assert names == [name for name in plan.by_name if name in set(names)]


class TestExperts:
    CONFIG = tiny_config(QWEN, layers=1, hidden=128, heads=4, kv_heads=4, moe_intermediate_size=128)

    # The scalars of all experts of which engines take the largest.
    READ_OF_OTHERS = {  # noqa: RUF012 (a constant)
        "fp8-tensor-static": {"weight_scale", "input_scale"},
        "nvfp4": {"weight_scale_2", "input_scale"},
        "int8-channel": set(),
        "fp8-block": set(),
        "mxfp4a16": set(),
        "int4-g64": set(),
    }

    @pytest.mark.parametrize("scheme", READ_OF_OTHERS)
    def test_scalars_that_engines_reduce_over_experts_are_delivered_for_all_experts(
        self, tmp_path: Path, scheme: str
    ) -> None:
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=self.CONFIG, scheme=scheme).directory)
        source = Source(checkpoint, experts=4)
        parallel = Parallel(tensor=2, expert=2)
        plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
        for rank in ranks_of(parallel):
            handed = delivered(checkpoint, plan_for_rank(plan, checkpoint.model, rank))
            for module in (each for each in plan.modules if EXPERT.match(each.name)):
                whole, found = source.whole(module), handed.get(module.name, {})
                if part_of(module.name, rank, experts=4) is None:
                    locals_ = {name.rpartition(".")[2] for name in found}
                    assert locals_ == self.READ_OF_OTHERS[scheme], module.name
                else:
                    assert found.keys() == whole.keys()
                assert all(same(tensor, whole[name]) for name, tensor in found.items())

    @pytest.mark.parametrize("scheme", ["fp8-channel-token", "nvfp4", "int8-plain-channel", "mxfp4a16", "dense"])
    def test_a_rank_reads_only_its_experts_of_a_tensor_of_all_experts(self, tmp_path: Path, scheme: str) -> None:
        config = tiny_config(QWEN, layers=1, hidden=128, heads=4, kv_heads=4, moe_intermediate_size=128)
        apart = open_checkpoint(write_checkpoint(tmp_path / "apart", config=config, scheme=scheme).directory)
        fused = write_checkpoint(tmp_path / "fused", config=config, scheme=scheme).directory
        rewrite(fused, fuse_experts)
        checkpoint = open_checkpoint(fused)
        for parallel in (Parallel(tensor=4, expert=4), Parallel(tensor=4, expert=2)):
            plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
            twin = apart.plan("tensorrt_llm", parallel=parallel)
            everything = sum(module.stored_bytes for module in plan.modules if EXPERT.match(module.name))
            for rank in ranks_of(parallel):
                want = delivered(apart, plan_for_rank(twin, apart.model, rank))
                shard = plan_for_rank(plan, checkpoint.model, rank)
                read = 0
                for module, tensors, count in measured(checkpoint, shard):
                    if EXPERT.match(module.name) and (part := part_of(module.name, rank, experts=4)):
                        read += count
                        self.assert_slices(module.name, tensors, want[module.name], part)
                assert 0 < read <= (1 / parallel.expert + 0.01) * everything

    @staticmethod
    def assert_slices(module: str, found: dict[str, Tensor], want: dict[str, Tensor], part: tuple[int, int]) -> None:
        assert found.keys() == want.keys()
        for name in found:
            local = name.rpartition(".")[2]
            one, other = (sliced(module, local, tensors[name], part)[0] for tensors in (found, want))
            assert same(one, other), name


class TestWhatIsHandedOverWhole:
    """Everything is read if a rank's rows don't follow from its number or are no run of the stored rows."""

    @staticmethod
    def assert_whole(checkpoint: Checkpoint, parallel: Parallel, leaves: Iterable[str]) -> None:
        plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
        whole = delivered(checkpoint, plan)
        for rank in ranks_of(parallel):
            handed = delivered(checkpoint, plan_for_rank(plan, checkpoint.model, rank))
            for module in (name for name in whole if name.rpartition(".")[2] in leaves):
                assert handed[module].keys() == whole[module].keys()
                assert all(same(tensor, whole[module][name]) for name, tensor in handed[module].items())

    @pytest.mark.parametrize("scheme", ["int8-channel", "fp8-channel-token", "nvfp4"])
    def test_linears_that_are_stored_as_one_are_read_whole(self, tmp_path: Path, scheme: str) -> None:
        config = tiny_config("Phi3ForCausalLM", layers=1, hidden=128, heads=4, kv_heads=2)
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config, scheme=scheme).directory)

        self.assert_whole(checkpoint, Parallel(tensor=2), ("qkv_proj", "gate_up_proj"))

    def test_attention_is_read_whole_under_attention_data_parallelism(self, tmp_path: Path) -> None:
        """Feed-forward parts are read whole too: engines slice them in more than one way then."""
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config_for(8), scheme="int8-channel").directory)
        parallel = Parallel(tensor=2, attention_dp=True)

        self.assert_whole(checkpoint, parallel, COLUMN_CUT | ROW_CUT | TABLES)

    def test_feed_forward_parts_that_fewer_ranks_may_share_are_read_whole(self, tmp_path: Path) -> None:
        config = tiny_config("DeepseekV3ForCausalLM")
        scheme = {"gate_proj": "fp8-channel-token", "up_proj": "fp8-channel-token"}
        checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config, scheme=scheme).directory)
        parallel = Parallel(tensor=2)
        plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
        whole = delivered(checkpoint, plan)
        names = [f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up")]
        names += [f"model.layers.1.mlp.shared_experts.{leaf}_proj" for leaf in ("gate", "up")]
        for rank in ranks_of(parallel, layers=2):
            handed = delivered(checkpoint, plan_for_rank(plan, checkpoint.model, rank))
            for module in names:
                assert all(same(tensor, whole[module][name]) for name, tensor in handed[module].items())


@pytest.mark.parametrize("kind", ["sparse-bitmask", "sparse-24-bitmask"])
@pytest.mark.parametrize("scheme", ["fp8-channel-token", "dense"])
def test_sparse_weights_are_read_whole_and_sliced_nevertheless(tmp_path: Path, scheme: str, kind: str) -> None:
    """The position of a row's values is known only after all rows before it were read."""

    def drop_half(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.endswith("proj.weight")]:
            odd = torch.arange(stored[name].shape[1]) % 2 == 1
            stored[name] = torch.where(odd, torch.zeros((), dtype=stored[name].dtype), stored[name])

    config = config_for(8, vocabulary=16)
    plain = write_checkpoint(tmp_path / "plain", config=config, scheme=scheme, edit=drop_half)
    sparse = write_checkpoint(tmp_path / "sparse", config=plain_with_sparsity(plain.config, kind), scheme=scheme)
    save_compressed(plain.stored, sparse.directory / FILE, kind, generation="0.9")
    twin, checkpoint = Source(open_checkpoint(plain.directory)), open_checkpoint(sparse.directory)
    plan = checkpoint.plan("tensorrt_llm", parallel=Parallel(tensor=4))
    for rank in ranks_of(plan.parallel):
        handed = delivered(checkpoint, plan_for_rank(plan, checkpoint.model, rank))
        for module in plan.modules:
            part = part_of(module.name, rank)
            assert part is not None
            whole = twin.whole(module)
            assert handed[module.name].keys() == whole.keys()
            for name, tensor in handed[module.name].items():
                local = name.rpartition(".")[2]
                mine, want = (sliced(module.name, local, each, part)[0] for each in (tensor, whole[name]))
                assert torch.equal(mine.double(), want.double()), name


def plain_with_sparsity(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same config.json, which says that the weights of Linears are sparse as well."""
    block = {**config["quantization_config"], "sparsity_config": {"format": kind, "targets": ["Linear"], "ignore": []}}
    return {**config, "quantization_config": block}


def test_a_single_rank_has_the_whole_plan(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, scheme="int4-g32-asym").directory)
    plan = checkpoint.plan("tensorrt_llm")
    shard = plan_for_rank(plan, checkpoint.model, Rank())

    assert shard.delivered_specs == plan.delivered_specs
    assert {module.reads for module in shard.modules} == {module.reads for module in plan.modules}


def test_sizes_of_another_plan_raise_an_assertion_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, config=config_for(8)).directory)
    plan = checkpoint.plan("tensorrt_llm", parallel=Parallel(tensor=2))

    with pytest.raises(AssertionError, match="tensor=2"):
        plan_for_rank(plan, checkpoint.model, Rank())
