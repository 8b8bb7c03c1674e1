"""How an engine spreads a model over ranks, and which rank one is; `plan/ranks/shard.py` makes a rank's plan of it.

Source: TensorRT-LLM `tensorrt_llm/mapping.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto
from typing import TYPE_CHECKING, Any, Protocol, Self

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.json_form import fields_form

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ONE_RANK", "Cut", "EngineMapping", "Parallel", "Rank"]


class Cut(StrEnum):
    """How an engine divides a weight [N, K] among the ranks of a tensor-parallel group."""

    NONE = auto()
    """every rank has all of it"""
    COLUMN = auto()
    """N is cut, "column parallel" to those who write weights as [in, out]"""
    ROW = auto()
    """K is cut"""
    KV_HEADS = auto()
    """N is cut by heads of the KV cache, which are repeated for ranks that outnumber them"""
    VOCABULARY = auto()
    """N is cut by ceiling division, the last rank's part padded"""


class EngineMapping(Protocol):
    """What is read of the engine's `Mapping`."""

    tp_size: int
    pp_size: int
    moe_ep_size: int
    enable_attention_dp: bool

    @property
    def tp_rank(self) -> int:
        """Rank within its pipeline stage."""

    @property
    def pp_rank(self) -> int:
        """The pipeline stage."""

    @property
    def moe_ep_rank(self) -> int:
        """Which share of the routed experts this rank has."""

    def pp_layers(self, num_layers: int, /) -> Sequence[int]:
        """The layers of this rank's stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Sizes of tensor, pipeline and expert parallelism.

    Routed experts are divided among `expert` ranks and each of them is cut into `tensor // expert`. With
    `attention_dp` every rank of a stage has all of attention.
    Raises `UsageError` for sizes below 1, and for an `expert` that doesn't divide `tensor`.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    attention_dp: bool = False

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline, self.expert) >= 1 and self.tensor % self.expert == 0:
            return
        raise UsageError(
            Fault(
                where="parallel sizes",
                expected="sizes of at least 1, and an expert-parallel size that divides the tensor-parallel one",
                found=f"tensor {self.tensor}, pipeline {self.pipeline}, expert {self.expert}",
                remedy="Give the sizes that the engine will run with.",
            )
        )

    @property
    def expert_tensor(self) -> int:
        """Into how many slices each routed expert is cut."""
        return self.tensor // self.expert

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return fields_form(self)


ONE_RANK = Parallel()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One rank: its place in each kind of parallelism.

    `layers` are those of its pipeline stage, by number; None for all of them.
    """

    parallel: Parallel = ONE_RANK
    tensor: int = 0
    pipeline: int = 0
    expert: int = 0
    layers: tuple[int, ...] | None = None

    @property
    def expert_tensor(self) -> int:
        """Which slice of each routed expert it has: expert ranks are neighbours."""
        return self.tensor // self.parallel.expert

    @classmethod
    def from_mapping(cls, mapping: EngineMapping, num_layers: int) -> Self:
        """The rank that the engine's mapping describes, for a model of `num_layers`.

        Raises `UsageError` for kinds of parallelism that cut attention or experts otherwise: context parallelism and
        clusters of experts.
        """
        _refuse_other_kinds(mapping)
        parallel = Parallel(
            tensor=mapping.tp_size,
            pipeline=mapping.pp_size,
            expert=max(mapping.moe_ep_size, 1),
            attention_dp=bool(mapping.enable_attention_dp),
        )
        return cls(
            parallel=parallel,
            tensor=mapping.tp_rank,
            pipeline=mapping.pp_rank,
            expert=mapping.moe_ep_rank,
            layers=tuple(mapping.pp_layers(num_layers)),
        )


def _refuse_other_kinds(mapping: EngineMapping) -> None:
    """Ranks of these would take rows that this package has not read."""
    for name in ("cp_size", "moe_cluster_size"):
        size = getattr(mapping, name, 1)
        if size > 1:
            raise UsageError(
                Fault(
                    where=f"mapping.{name}",
                    expected="1: tensor, pipeline and expert parallelism are served",
                    found=str(size),
                    remedy="Leave it out, or convert the checkpoint with `trtllm-ct convert` and load it without this.",
                )
            )
