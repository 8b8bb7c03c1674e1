"""Round to E2M1, the numbers of four bits that NVFP4 and MXFP4 have: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.

Source of the format: OCP Microscaling Formats 1.0, section 5.3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

__all__ = ["nearest", "pairs_of_codes", "squared_errors"]


def squared_errors(values: Floats, scale: Floats) -> Floats:
    """Return the squared error of groups [N, G, width] with scales [N, G], float32 [N, G].

    The errors of values are added in the order of columns, so that a compiled loop gives the same bits.
    """
    import numpy as np

    magnitudes, scales = np.abs(values), scale[..., None]
    rounded = _numbers()[nearest(magnitudes * (np.float32(1) / scales), _numbers())]
    errors: Floats = np.add.accumulate(np.square(magnitudes - rounded * scales), axis=-1)[..., -1]
    return errors


def pairs_of_codes(values: Floats, scale: Floats) -> Bytes:
    """Return pairs of codes, uint8 [N, K/2], of groups [N, G, width] with scales [N, G].

    The code of the even column is in the low half. Values are rounded to the nearest number, ties to even.
    """
    import numpy as np

    numbers = values * (np.float32(1) / scale[..., None])
    sign = np.signbit(numbers).astype(np.uint8) * np.uint8(8)
    rows, groups, width = values.shape
    fields = (nearest(np.abs(numbers), _numbers()) | sign).reshape(rows, groups * width)
    return fields[:, 0::2] | fields[:, 1::2] * np.uint8(16)


def nearest(magnitudes: Floats, numbers: Floats) -> Bytes:
    """Return the index of the nearest of some ascending numbers; of two that are equally near, the even one."""
    import numpy as np

    # Midpoints of E4M3 and E2M1 are exact in float32.
    middles = (numbers[:-1] + numbers[1:]) / np.float32(2)
    below = np.searchsorted(middles, magnitudes, side="left")
    at_or_below = np.searchsorted(middles, magnitudes, side="right")
    return np.where(below % 2 == 0, below, at_or_below).astype(np.uint8)


def _numbers() -> Floats:
    """Return the numbers of E2M1 from 0 to 6, by their bits."""
    import numpy as np

    return np.array((0, 0.5, 1, 1.5, 2, 3, 4, 6), np.float32)
