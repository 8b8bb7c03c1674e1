"""Tensors of a source that its index does not list: which of them a conversion may leave out.

Tools have left weights in shards that their index no longer lists, and have added tensors without listing them. A
reader that follows the index needs the second kind where the model lacks them, and never the first kind.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trtllm_ct.verify.source.modules import Modules

__all__ = ["tensors_that_may_be_left_out"]

# Every text model has the first and the last; a head that is not tied lies in the files too.
_ALWAYS_NEEDED = frozenset({"embed_tokens", "norm", "lm_head"})
_LAYER = re.compile(r"layers\.(\d+)\.")
_NUMBER = re.compile(r"\d+")


def tensors_that_may_be_left_out(source: Modules, unlisted: frozenset[str], layers: int) -> frozenset[str]:
    """Return the `unlisted` tensors that no listed one suggests that the model has; `layers` is 0 if it is not known.

    A tensor is needed if the index lists that of another layer or expert, so that it was only forgotten here.
    """
    if not unlisted:
        return unlisted
    listed = {_NUMBER.sub("#", place) for name, place in _places(source) if name not in unlisted}
    return frozenset(
        name
        for name, place in _places(source)
        if name in unlisted
        and place.rpartition(".")[0] not in _ALWAYS_NEEDED
        and (_is_beyond(place, layers) or _NUMBER.sub("#", place) not in listed)
    )


def _places(source: Modules) -> Iterator[tuple[str, str]]:
    """Yield the name of each stored tensor with its place in the model: the key of its module and its local name."""
    for key, module in source.by_key.items():
        for local, tensor in module.tensors.items():
            yield getattr(tensor, "name", f"{module.name}.{local}"), f"{key}.{local}"


def _is_beyond(place: str, layers: int) -> bool:
    """Whether a tensor belongs to a layer after the last one."""
    match = _LAYER.match(place)
    return match is not None and 0 < layers <= int(match[1])
