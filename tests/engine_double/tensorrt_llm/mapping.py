"""Imitates `mapping.py`: the part of a model that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mapping"]


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """Sizes and the rank; tensor parallel ranks of one pipeline stage are neighbours."""

    world_size: int = 1
    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1
    moe_tp_size: int = -1
    moe_ep_size: int = -1
    gpus_per_node: int = 8
    enable_attention_dp: bool = False

    def __post_init__(self) -> None:
        if self.tp_size * self.pp_size != self.world_size:
            raise ValueError(
                f"world_size must equal to tp_size * pp_size, but got {self.world_size} != "
                f"{self.tp_size} * {self.pp_size}"
            )
        # One of the two sizes of experts follows from the other; experts are cut by rows where both are unset.
        has_tensor_size, has_expert_size = self.moe_tp_size > 0, self.moe_ep_size > 0
        experts = self.moe_ep_size if has_expert_size else self.tp_size // self.moe_tp_size if has_tensor_size else 1
        tensors = self.moe_tp_size if has_tensor_size else self.tp_size // experts
        object.__setattr__(self, "moe_ep_size", experts)
        object.__setattr__(self, "moe_tp_size", tensors)
        if experts * tensors != self.tp_size:
            raise ValueError(f"tp_size must equal to moe_tp_size * moe_ep_size, got {self.tp_size}")

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def moe_tp_rank(self) -> int:
        return self.tp_rank // self.moe_ep_size

    @property
    def moe_ep_rank(self) -> int:
        return self.tp_rank % self.moe_ep_size

    @property
    def tp_group(self) -> list[int]:
        first = self.pp_rank * self.tp_size
        return list(range(first, first + self.tp_size))

    @property
    def pp_group(self) -> list[int]:
        return list(range(self.tp_rank, self.world_size, self.tp_size))

    def has_pp(self) -> bool:
        return self.pp_size > 1

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def prev_pp_rank(self) -> int:
        return self.rank - self.tp_size

    def next_pp_rank(self) -> int:
        return self.rank + self.tp_size

    def pp_layers(self, num_layers: int) -> list[int]:
        """Layers of this stage; the first stages take one more when they don't divide."""
        each, more = divmod(num_layers, self.pp_size)
        first = self.pp_rank * each + min(self.pp_rank, more)
        return list(range(first, first + each + (self.pp_rank < more)))

    def ep_experts(self, num_experts: int) -> list[int]:
        """Experts of this rank."""
        each = num_experts // self.moe_ep_size
        return list(range(self.moe_ep_rank * each, (self.moe_ep_rank + 1) * each))
