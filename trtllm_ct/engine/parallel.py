"""How an engine distributes a model among ranks; `plan/ranks/shard.py` makes the plan of one rank from it.

Source: TensorRT-LLM `tensorrt_llm/mapping.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import auto
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_ct.base.arguments import FLAG, check_arguments, whole_number
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.json_form import fields_form
from trtllm_ct.base.str_enum import StrEnum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

__all__ = ["MAX_RANKS", "ONE_RANK", "Cut", "EngineMapping", "Parallel", "Rank"]


MAX_RANKS = 4096
"""The largest size of each kind. Plans look at the slice of every rank; the largest engines have some hundred ranks."""


class Cut(StrEnum):
    """How an engine divides a weight [N, K] among the ranks of a tensor-parallel group."""

    NONE = auto()
    """Every rank has the whole weight."""
    COLUMN = auto()
    """N is divided. The name follows from writing weights as [in, out], where N is the number of columns."""
    ROW = auto()
    """K is divided."""
    KV_HEADS = auto()
    """N is divided by K/V heads; if there are more ranks than heads, the heads are repeated."""
    VOCABULARY = auto()
    """N is divided with ceiling division; the last rank's part is padded."""


class EngineMapping(Protocol):
    """The attributes of the engine's `Mapping` that are read."""

    tp_size: int
    pp_size: int
    moe_ep_size: int
    enable_attention_dp: bool

    @property
    def tp_rank(self) -> int:
        """The number of the rank within its pipeline stage."""

    @property
    def pp_rank(self) -> int:
        """The pipeline stage."""

    @property
    def moe_ep_rank(self) -> int:
        """The number of the rank's share of the routed experts."""

    def pp_layers(self, num_layers: int, /) -> Sequence[int]:
        """Return the numbers of the layers in the rank's stage."""


_SIZE = whole_number("a number of ranks", remedy="Give the size that the engine will run with.")
_SIZES = {"tensor": _SIZE, "pipeline": _SIZE, "expert": _SIZE, "attention_dp": FLAG}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Sizes of tensor, pipeline and expert parallelism.

    The routed experts are divided among `expert` ranks, and each expert is sliced for `tensor // expert` ranks. With
    `attention_dp` every rank of a stage has the whole attention.
    Raises `UsageError` for sizes that are no integers, that are below 1 or above `MAX_RANKS`, and for an `expert` that
    doesn't divide `tensor`.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    attention_dp: bool = False

    def __post_init__(self) -> None:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "expert": self.expert}
        check_arguments(_SIZES, {**sizes, "attention_dp": self.attention_dp})
        if all(1 <= size <= MAX_RANKS for size in sizes.values()) and self.tensor % self.expert == 0:
            return
        raise UsageError(
            Fault(
                where="parallel sizes",
                expected=f"sizes from 1 to {MAX_RANKS}, an expert-parallel size that divides the tensor-parallel one",
                found=f"tensor {self.tensor}, pipeline {self.pipeline}, expert {self.expert}",
                remedy="Give the sizes that the engine will run with.",
            )
        )

    @classmethod
    def from_mapping(cls, mapping: EngineMapping) -> Self:
        """Return the sizes that the engine's mapping describes."""
        return cls(
            tensor=mapping.tp_size,
            pipeline=mapping.pp_size,
            expert=max(mapping.moe_ep_size, 1),
            attention_dp=bool(mapping.enable_attention_dp),
        )

    @property
    def expert_tensor(self) -> int:
        """The number of slices of each routed expert."""
        return self.tensor // self.expert

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return fields_form(self)


ONE_RANK = Parallel()
"""The sizes of an engine that runs on a single rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """The position of one rank in each kind of parallelism.

    `layers` are the numbers of the layers in its pipeline stage, None for all layers.
    """

    parallel: Parallel = ONE_RANK
    tensor: int = 0
    pipeline: int = 0
    expert: int = 0
    layers: tuple[int, ...] | None = None

    @property
    def expert_tensor(self) -> int:
        """The number of the rank's slice of each routed expert; the ranks of an expert group are neighbours."""
        return self.tensor // self.parallel.expert

    @classmethod
    def from_mapping(cls, mapping: EngineMapping, num_layers: int) -> Self:
        """Return the rank that the engine's mapping describes, for a model with `num_layers` layers.

        Raises `UsageError` for context parallelism and clusters of experts, which divide attention or experts in other
        ways.
        """
        _refuse_other_kinds(mapping)
        return cls(
            parallel=Parallel.from_mapping(mapping),
            tensor=mapping.tp_rank,
            pipeline=mapping.pp_rank,
            expert=mapping.moe_ep_rank,
            layers=tuple(mapping.pp_layers(num_layers)),
        )


def _refuse_other_kinds(mapping: EngineMapping) -> None:
    """Raise `UsageError` for unsupported kinds of parallelism: their ranks would use rows that were not read."""
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
