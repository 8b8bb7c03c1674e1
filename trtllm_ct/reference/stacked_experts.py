"""Read the experts of a directory one by one, whether they are stored one by one or stacked.

Stacked, the experts of a layer are two tensors [E, in, 2 out] and [E, in, out]. The class of the model says which
order the axes have (`names.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from trtllm_ct.reference.names import stacked_suffixes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.checkpoint.reader import TensorReader

__all__ = ["UnstackedReader"]

_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class _Part(NamedTuple):
    """The columns `begin` to `end` of one expert in a stacked tensor."""

    stack: str
    expert: int
    begin: int
    end: int


class UnstackedReader:
    """Reads tensors by the names that they have when experts are stored one by one; `names` are all of them.

    `config` is the parsed config.json of the directory.
    """

    def __init__(self, reader: TensorReader, catalog: Catalog, config: Mapping[str, Any]) -> None:
        self._reader = reader
        suffixes = stacked_suffixes(config)
        stacks = [name for name in catalog.tensors if name.endswith(suffixes)]
        self._parts = dict(_parts((name, catalog.spec(name).shape) for name in stacks))
        self.names = (*(name for name in catalog.tensors if name not in stacks), *self._parts)

    def read(self, name: str) -> Tensor:
        """Return a tensor; a part of a stacked tensor is a contiguous copy [out, in]."""
        part = self._parts.get(name)
        if part is None:
            return self._reader.read(name)
        return self._reader.read(part.stack)[part.expert, :, part.begin : part.end].T.contiguous()


def _parts(stacks: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, _Part]]:
    """Yield the weights in stacked tensors by name; a tensor with another number of axes has none."""
    for stack, shape in stacks:
        owner, _, local = stack.rpartition(".")
        if len(shape) != 3:
            continue
        width = shape[2] // len(_PROJECTIONS[local])
        for expert in range(shape[0]):
            for number, projection in enumerate(_PROJECTIONS[local]):
                part = _Part(stack, expert, number * width, (number + 1) * width)
                yield f"{owner}.{expert}.{projection}.weight", part
