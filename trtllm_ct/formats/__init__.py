"""The table of weight formats: its entries are the support list, and exactly one must accept a quantized module.

base.py           the contract of a format, and Codes, where formats and targets meet
codecs.py         who decodes: this package, or the compressed-tensors library
companions.py     checks of scales and zero points that formats share
group_index.py    `weight_g_idx`: activation ordering
packed_int.py     `pack-quantized`
plain_codes.py    `int-quantized`, `float-quantized`, `naive-quantized`
marlin_24.py      `marlin-24`
small_floats.py   what formats of small floats share
nvfp4.py          `nvfp4-pack-quantized`
microscaling.py   what MXFP4, MXFP6 and MXFP8 share
mxfp4.py          `mxfp4-pack-quantized`
mxfp6.py          `mxfp6-pack-quantized`
mxfp8.py          `mxfp8-quantized`
sparse/           sparse tensors, around any of these
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.formats.base import Codes, StoredSpecs, StoredWeight, WeightFormat
from trtllm_ct.formats.marlin_24 import MARLIN_24
from trtllm_ct.formats.mxfp4 import MXFP4
from trtllm_ct.formats.mxfp6 import MXFP6
from trtllm_ct.formats.mxfp8 import MXFP8
from trtllm_ct.formats.nvfp4 import NVFP4
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.formats.plain_codes import FLOAT8, INT8

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import QuantArgs

__all__ = ["FORMATS", "Codes", "StoredSpecs", "StoredWeight", "WeightFormat", "format_for"]

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


def format_for(args: QuantArgs, stored: StoredSpecs) -> WeightFormat | None:
    """The one format that accepts these arguments and tensors, or None.

    Entries exclude each other (a test walks the grid of arguments and tensors), so their order has no meaning.
    """
    return next((entry for entry in FORMATS if entry.accepts(args, stored)), None)
