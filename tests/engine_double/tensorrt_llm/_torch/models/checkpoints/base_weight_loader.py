"""Imitates `checkpoints/base_weight_loader.py`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from tensorrt_llm._double import RELEASE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from collections.abc import Mapping as Dictionary

    from tensorrt_llm.mapping import Mapping
    from torch import Tensor

__all__ = ["BaseWeightLoader", "ConsumableWeightsDict"]


class ConsumableWeightsDict:
    """A locked dictionary, and no subclass of dict, whose entries go away once a module has taken them."""

    def __init__(self, weights: Dictionary[str, Tensor]) -> None:
        self._weights = dict(weights)
        self._lock = threading.Lock()

    @classmethod
    def take_ownership(cls, source: Any, derived: Dictionary[str, Tensor]) -> ConsumableWeightsDict:
        return cls(derived)

    def __getitem__(self, key: str) -> Tensor:
        return self._weights[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        with self._lock:
            self._weights[key] = value

    def __delitem__(self, key: str) -> None:
        with self._lock:
            del self._weights[key]

    def __contains__(self, key: object) -> bool:
        return key in self._weights

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        with self._lock:
            return list(self._weights)

    def values(self) -> list[Tensor]:
        with self._lock:
            return list(self._weights.values())

    def items(self) -> list[tuple[str, Tensor]]:
        with self._lock:
            return list(self._weights.items())

    def get(self, key: str, default: Any = None) -> Any:
        return self._weights.get(key, default)

    def update(self, other: Dictionary[str, Tensor]) -> None:
        with self._lock:
            self._weights.update(other)

    def clear(self) -> None:
        with self._lock:
            self._weights.clear()

    def filter_prefix(self, prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) + 1 :]: value for key, value in self.items() if key.startswith(prefix)}

    def mark_consumed(self, prefix: str) -> int:
        return self._drop(lambda key: key.startswith(f"{prefix}."))

    def mark_consumed_keys(self, keys: Iterable[str]) -> int:
        return self._drop(set(keys).__contains__)

    def _drop(self, done: Callable[[str], bool]) -> int:
        with self._lock:
            gone = [key for key in self._weights if done(key)]
            for key in gone:
                del self._weights[key]
        return len(gone)


class BaseWeightLoader(ABC):
    """Directory to tensors; releases differ in whether they tell the mapping."""

    if RELEASE.mapping_argument:

        @abstractmethod
        def load_weights(self, checkpoint_dir: str, mapping: Mapping, **kwargs: Any) -> Any: ...
    else:

        @abstractmethod
        def load_weights(self, checkpoint_dir: str, **kwargs: Any) -> Any: ...  # type: ignore[misc]

    def cleanup(self) -> None: ...
