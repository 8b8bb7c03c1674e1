"""Imitates `checkpoints/base_weight_loader.py`: the base class, and the dictionary that newer loaders return."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from tensorrt_llm._double import RELEASE

if TYPE_CHECKING:
    from tensorrt_llm.mapping import Mapping
    from torch import Tensor

__all__ = ["BaseWeightLoader", "ConsumableWeightsDict"]


class ConsumableWeightsDict(MutableMapping[str, "Tensor"]):
    """Not a subclass of dict; iteration uses snapshots, and entries are removed once a module has copied them."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = dict(weights)
        self._lock = threading.Lock()

    @classmethod
    def take_ownership(cls, source: object, derived: dict[str, Tensor]) -> ConsumableWeightsDict:
        return cls(derived)

    def __getitem__(self, key: str) -> Tensor:
        return self._weights[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        with self._lock:
            self._weights[key] = value

    def __delitem__(self, key: str) -> None:
        with self._lock:
            del self._weights[key]

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._weights))

    def filter_prefix(self, prefix: str) -> dict[str, Tensor]:
        with self._lock:
            return {key[len(prefix) + 1 :]: value for key, value in self._weights.items() if key.startswith(prefix)}

    def mark_consumed(self, prefix: str) -> int:
        return self.mark_consumed_keys([key for key in self if key.startswith(f"{prefix}.")])

    def mark_consumed_keys(self, keys: Iterable[str]) -> int:
        return sum(self.pop(key, None) is not None for key in keys)


class BaseWeightLoader(ABC):  # noqa: B024 (its abstract method is one of two)
    """Loads tensors from a directory; releases differ in whether they pass the mapping."""

    if RELEASE.mapping_argument:

        @abstractmethod
        def load_weights(self, checkpoint_dir: str, mapping: Mapping, **kwargs: Any) -> Any: ...
    else:

        @abstractmethod
        def load_weights(self, checkpoint_dir: str, **kwargs: Any) -> Any: ...  # type: ignore[misc]

    def cleanup(self) -> None:  # noqa: B027 (as upstream)
        """Nothing to drop."""
