"""The weight formats that this package reads, in the table `FORMATS`.

The table is the support list: exactly one of its entries must accept a quantized module.

base.py           the interface of a format, and Codes, the form that formats hand to targets
codecs.py         the two decoders: this package and the compressed-tensors library
library.py        that library: what each of its releases decodes, and how it is called
companions.py     checks of codes, scales and zero points for integer and float8 formats
group_index.py    `weight_g_idx`: activation ordering
packed_int.py     `pack-quantized`
plain_codes.py    `int-quantized`, `float-quantized`, `naive-quantized`
marlin_24.py      `marlin-24`
small_floats.py   checks and helpers that NVFP4 and the MX formats share
nvfp4.py          `nvfp4-pack-quantized`
microscaling.py   the base class of MXFP4, MXFP6 and MXFP8
mxfp4.py          `mxfp4-pack-quantized`
mxfp6.py          `mxfp6-pack-quantized`
mxfp8.py          `mxfp8-quantized`
sparse/           sparse storage of tensors, which wraps any of these formats
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.formats.base import Axis, Codes, StoredSpecs, StoredWeight, WeightFormat
from trtllm_ct.formats.marlin_24 import MARLIN_24
from trtllm_ct.formats.mxfp4 import MXFP4
from trtllm_ct.formats.mxfp6 import MXFP6
from trtllm_ct.formats.mxfp8 import MXFP8
from trtllm_ct.formats.nvfp4 import NVFP4
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.formats.plain_codes import FLOAT8, INT8

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from trtllm_ct.base.schemes import QuantArgs

__all__ = [
    "FORMATS",
    "PACKED_CODES",
    "WEIGHT_TENSORS",
    "ZERO_POINTS",
    "Axis",
    "Codes",
    "StoredSpecs",
    "StoredWeight",
    "WeightFormat",
    "axes_of",
    "format_for",
]

FORMATS: tuple[WeightFormat, ...] = (
    PACKED_INT,
    MARLIN_24,
    INT8,
    FLOAT8,
    NVFP4,
    MXFP4,
    MXFP6,
    MXFP8,
)

WEIGHT_TENSORS: Mapping[str, frozenset[Axis]] = {
    name: frozenset(entry.axes[name] for entry in FORMATS if name in entry.axes)
    for name in dict.fromkeys(name for entry in FORMATS for name in entry.axes)
}
"""The tensors that a quantized weight may have, by local name, with the axes that the formats give for each."""

ZERO_POINTS = tuple(dict.fromkeys(entry.zero_point for entry in FORMATS))
"""Local names of zero points."""

PACKED_CODES = frozenset(entry.codes for entry in FORMATS) - {"weight"}
"""Local names of codes other than `weight`. A module with such a tensor is quantized, whatever the tensor's dtype."""


def axes_of(stored: Collection[str]) -> dict[str, Axis]:
    """Return what each tensor of a quantized module belongs to, by local name, before its format is known.

    `stored` are the local names of the module's tensors; names that no format has are left out. The formats that have
    all of the others agree. If no format has all of them, each is what it is in any format.
    """
    names = [name for name in stored if name in WEIGHT_TENSORS]
    for entry in FORMATS:
        if entry.codes in names and entry.axes.keys() >= set(names):
            return {name: entry.axes[name] for name in names}
    return {name: min(WEIGHT_TENSORS[name]) for name in names}


def format_for(args: QuantArgs, stored: StoredSpecs) -> WeightFormat | None:
    """Return the format that accepts a module with these arguments and tensors, or None if there is none.

    No two entries accept the same module (a test tries the grid of arguments and tensors), so the order of the table
    does not matter.
    """
    return next((entry for entry in FORMATS if entry.accepts(args, stored)), None)
