"""The order of integer codes that TensorRT-LLM's kernel for 16-bit inputs and narrow weights reads.

Codes [N, K] become one stream of bytes. Within it the codes of a row stay together, or those of `bundle` rows if the
kernel reads tiles of several rows in turn. Axis letters: `O` out (rows, N), `I` in (columns, K).
Source: TensorRT-LLM `quantization/functional.py: preprocess_weights_for_mixed_gemm` (2a9abd95), and
`cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp` (b35ac1b6) with the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["TILE", "KernelOrder", "in_kernel_order"]

TILE = 64
"""Columns of a tile: 128 bytes of 16-bit inputs. The number of columns must be a multiple of it."""

_SHUFFLES = {
    4: (
        0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27,
        4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23, 30, 31,
    ),
    8: (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15),
}  # fmt: skip
"""By bits of a code: the column of a block that comes first, second, and so on, as a matrix instruction reads them."""

_REGISTERS = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
"""By bits of a code: the order in the 32 bits of a register, from which the kernel converts codes in pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOrder:
    """The order for codes of `bits` bits on one generation of GPUs.

    `bundle` is the number of consecutive rows whose tiles follow each other in turn; 1 if each row stays by itself.
    """

    bits: Literal[4, 8]
    bundle: int


def in_kernel_order(codes_OI: NDArray[np.int8], order: KernelOrder) -> NDArray[np.uint8]:
    """Return signed int8 codes [N, K] as the bytes that the kernel reads: uint8 [N / bundle, bundle * K * bits / 8].

    N must be a multiple of `bundle`, and K of `TILE`.
    """
    import numpy as np

    rows, columns = codes_OI.shape
    shuffle = list(_SHUFFLES[order.bits])
    registers = list(_REGISTERS[order.bits])
    # The addition wraps around in uint8, so that the smallest code becomes 0.
    fields = (codes_OI.view(np.uint8) + np.uint8(1 << (order.bits - 1))) & np.uint8((1 << order.bits) - 1)
    fields = fields.reshape(rows, -1, len(shuffle))[..., shuffle]
    fields = fields.reshape(rows // order.bundle, order.bundle, columns // TILE, TILE).swapaxes(1, 2)
    fields = fields.reshape(rows // order.bundle, -1, len(registers))[..., registers]
    fields = fields.reshape(rows // order.bundle, -1)
    return fields if order.bits == 8 else fields[:, ::2] | (fields[:, 1::2] << np.uint8(4))
