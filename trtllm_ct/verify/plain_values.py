"""Look for numbers in the plain tensors of a source that are not finite; the model may compute NaN from them.

They are no faults: a tensor is delivered as it is stored, and a reader may have a use for an infinity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.base.dtypes import DType
from trtllm_ct.plan.stored import QUANTIZATION_TENSORS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.plan.plan import ModulePlan
    from trtllm_ct.verify.source.files import TensorFiles

__all__ = ["PlainWatch"]

_CHUNK_BYTES = 1 << 20
_MOST_NAMED = 5

_INFINITIES: Mapping[DType, tuple[str, int]] = {
    DType.F64: ("<u8", 0x7FF0_0000_0000_0000),
    DType.F32: ("<u4", 0x7F80_0000),
    DType.F16: ("<u2", 0x7C00),
    DType.BF16: ("<u2", 0x7F80),
}
"""The unsigned integer of as many bits as each wide float has, and the bits of infinity; those of NaN are above it."""


@dataclass(slots=True)
class PlainWatch:
    """Looks at the plain tensors of one module after another, once at each; reads them in chunks of 1 MiB."""

    _seen: set[str] = field(init=False, default_factory=set)
    _found: list[str] = field(init=False, default_factory=list)

    def look(self, module: ModulePlan, files: TensorFiles) -> None:
        """Note the plain tensors of a module that hold numbers that are not finite.

        Scales and transforms are left out, whose values `pipeline/payload.py` checks, and so is what is not delivered.
        """
        for name in _plain_tensors(module, files):
            if name not in self._seen:
                self._seen.add(name)
                self._found += _not_finite(name, files)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A warning for each of the first tensors, with its first such element, and one that counts the others."""
        more = len(self._found) - _MOST_NAMED
        others = (f"{more} more plain tensors hold numbers that are not finite",) if more > 0 else ()
        return (*self._found[:_MOST_NAMED], *others)


def _plain_tensors(module: ModulePlan, files: TensorFiles) -> Iterator[str]:
    """Yield the names of the stored tensors that hold a module's plain values."""
    for local, view in module.views.items():
        if local not in module.ignored and local not in QUANTIZATION_TENSORS and "." not in local:
            yield from (name for name in view.sources if files.catalog.tensors[name].spec.dtype in _INFINITIES)


def _not_finite(name: str, files: TensorFiles) -> Iterator[str]:
    """Yield the warning about a tensor, if one of its elements is not finite."""
    spec = files.catalog.tensors[name].spec
    kind, infinity = _INFINITIES[spec.dtype]
    count, first, value = 0, 0, ""
    for begin in range(0, spec.nbytes, _CHUNK_BYTES):
        bits = files.read(name, begin, min(_CHUNK_BYTES, spec.nbytes - begin)).view(kind)
        magnitudes = bits << 1  # without the sign
        if magnitudes.max() < infinity << 1:
            continue
        bad = np.flatnonzero(magnitudes >= infinity << 1)
        if not count:
            first = begin // spec.dtype.itemsize + int(bad[0])
            negative = infinity | 1 << (spec.dtype.bits - 1)
            value = {infinity: "inf", negative: "-inf"}.get(int(bits[bad[0]]), "nan")
        count += len(bad)
    if count:
        place = [int(index) for index in np.unravel_index(first, spec.shape)]
        share = f"{count} of {spec.numel} elements are NaN or infinite"
        yield f"{name}{place or ''} is {value} ({share}), so that the model may compute NaN"
