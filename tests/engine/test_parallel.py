"""Parallel sizes and ranks: which sizes there are, and where the engine's `Mapping` puts a rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from trtllm_ct.base.errors import UsageError
from trtllm_ct.engine.parallel import ONE_RANK, Parallel, Rank

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """An engine's `Mapping`: the ranks of a stage are neighbours, and so are the ranks of an expert group."""

    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1
    moe_ep_size: int = 1
    enable_attention_dp: bool = False

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def moe_ep_rank(self) -> int:
        return self.tp_rank % max(self.moe_ep_size, 1)

    def pp_layers(self, num_layers: int, /) -> Sequence[int]:
        """The first stages have one layer more if the layers can't be divided evenly."""
        return range(num_layers)[self._first(num_layers, self.pp_rank) : self._first(num_layers, self.pp_rank + 1)]

    def _first(self, num_layers: int, stage: int) -> int:
        each, more = divmod(num_layers, self.pp_size)
        return stage * each + min(stage, more)


@dataclass(frozen=True, kw_only=True)
class MappedOtherwise(Mapped):
    """A `Mapping` of an engine that has further kinds of parallelism."""

    cp_size: int = 1
    moe_cluster_size: int = 1


SIZES = st.builds(
    lambda expert, slices, pipeline: Parallel(tensor=expert * slices, pipeline=pipeline, expert=expert),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
)


def ranks_of(parallel: Parallel, layers: int) -> list[Rank]:
    """Every rank of an engine."""
    sizes = {"tp_size": parallel.tensor, "pp_size": parallel.pipeline, "moe_ep_size": parallel.expert}
    world = parallel.tensor * parallel.pipeline
    return [Rank.from_mapping(Mapped(rank=rank, **sizes), layers) for rank in range(world)]


class TestSizes:
    @settings(deadline=None)
    @given(st.integers(-2, 9), st.integers(-2, 3), st.integers(-2, 9))
    def test_are_positive_and_experts_divide_a_tensor_parallel_group(
        self, tensor: int, pipeline: int, expert: int
    ) -> None:
        works = tensor > 0 and pipeline > 0 and expert in [size for size in range(1, 10) if tensor % size == 0]
        try:
            Parallel(tensor=tensor, pipeline=pipeline, expert=expert)
        except UsageError:
            assert not works
        else:
            assert works

    @pytest.mark.parametrize(
        ("sizes", "found"),
        [
            ({"tensor": 0}, "tensor 0, pipeline 1, expert 1"),
            ({"pipeline": -1}, "tensor 1, pipeline -1, expert 1"),
            ({"expert": 0}, "tensor 1, pipeline 1, expert 0"),
            ({"tensor": 4, "expert": 3}, "tensor 4, pipeline 1, expert 3"),
            ({"tensor": 2, "expert": 4}, "tensor 2, pipeline 1, expert 4"),
        ],
    )
    def test_impossible_sizes_are_refused_with_all_sizes(self, sizes: dict[str, int], found: str) -> None:
        with pytest.raises(UsageError) as caught:
            Parallel(**sizes)

        (fault,) = caught.value.faults
        assert (fault.where, fault.found) == ("parallel sizes", found)
        assert "divides the tensor-parallel one" in fault.expected

    def test_the_default_is_one_rank(self) -> None:
        assert Parallel(tensor=1, pipeline=1, expert=1, attention_dp=False) == ONE_RANK

    @given(SIZES)
    def test_each_expert_is_cut_among_the_ranks_that_have_it(self, parallel: Parallel) -> None:
        assert parallel.expert_tensor * parallel.expert == parallel.tensor

    @pytest.mark.parametrize("parallel", [ONE_RANK, Parallel(tensor=8, pipeline=2, expert=4, attention_dp=True)])
    def test_json_keeps_everything(self, parallel: Parallel) -> None:
        assert Parallel(**json.loads(json.dumps(parallel.to_dict()))) == parallel


class TestRanks:
    @settings(deadline=None)
    @given(SIZES, st.integers(0, 7))
    def test_of_one_stage_divide_everything_exactly_once(self, parallel: Parallel, layers: int) -> None:
        """Each slice of a Linear, and each slice of each share of the experts, belongs to one rank."""
        ranks = ranks_of(parallel, layers)
        for stage in range(parallel.pipeline):
            in_stage = [rank for rank in ranks if rank.pipeline == stage]
            shares = [(expert, part) for expert in range(parallel.expert) for part in range(parallel.expert_tensor)]
            assert sorted(rank.tensor for rank in in_stage) == list(range(parallel.tensor))
            assert sorted((rank.expert, rank.expert_tensor) for rank in in_stage) == shares

    @settings(deadline=None)
    @given(SIZES, st.integers(0, 7))
    def test_every_layer_is_in_one_stage(self, parallel: Parallel, layers: int) -> None:
        """Uneven stages and those without a layer too."""
        stages = [rank.layers or () for rank in ranks_of(parallel, layers) if rank.tensor == 0]

        assert len(stages) == parallel.pipeline
        assert [layer for stage in stages for layer in stage] == list(range(layers))

    @pytest.mark.parametrize(("tensor", "share", "part"), [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)])
    def test_expert_ranks_are_neighbours(self, tensor: int, share: int, part: int) -> None:
        rank = ranks_of(Parallel(tensor=4, expert=2), layers=1)[tensor]

        assert (rank.expert, rank.expert_tensor) == (share, part)

    def test_the_default_rank_has_every_layer(self) -> None:
        assert Rank() == Rank(parallel=ONE_RANK, tensor=0, pipeline=0, expert=0, layers=None)
        assert Rank().expert_tensor == 0


class TestMapping:
    def test_every_attribute_is_read(self) -> None:
        mapping = Mapped(rank=11, tp_size=8, pp_size=2, moe_ep_size=2, enable_attention_dp=True)

        assert Rank.from_mapping(mapping, 3) == Rank(
            parallel=Parallel(tensor=8, pipeline=2, expert=2, attention_dp=True),
            tensor=3,
            pipeline=1,
            expert=1,
            layers=(2,),
        )

    @pytest.mark.parametrize("unset", [0, -1])
    def test_an_expert_size_that_was_never_set_is_one(self, unset: int) -> None:
        rank = Rank.from_mapping(Mapped(rank=1, tp_size=2, moe_ep_size=unset), 1)

        assert (rank.parallel.expert, rank.expert, rank.expert_tensor) == (1, 0, 1)

    def test_attention_dp_becomes_a_boolean(self) -> None:
        """Engines use None for an option that was not set; the sizes of two plans have to compare equal."""
        mapping = Mapped(enable_attention_dp=None)  # type: ignore[arg-type]

        assert Rank.from_mapping(mapping, 1).parallel.attention_dp is False

    @pytest.mark.parametrize("kind", ["cp_size", "moe_cluster_size"])
    def test_other_kinds_of_parallelism_are_refused_by_name(self, kind: str) -> None:
        with pytest.raises(UsageError) as caught:
            Rank.from_mapping(MappedOtherwise(**{kind: 2}), 1)

        assert [(fault.where, fault.found) for fault in caught.value.faults] == [(f"mapping.{kind}", "2")]

    def test_an_engine_that_has_other_kinds_and_uses_none_is_accepted(self) -> None:
        assert Rank.from_mapping(MappedOtherwise(), 1) == Rank.from_mapping(Mapped(), 1)
