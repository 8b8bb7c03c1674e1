"""The operations of modules that are requantized on request; they belong to the closed set of `ops.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, PayloadError
from trtllm_ct.base.schemes import Element
from trtllm_ct.engine.requantization import NVFP4_GLOBAL_SCALE
from trtllm_ct.layouts.packing import packed_words
from trtllm_ct.layouts.requantize import LARGEST_OF_NVFP4, to_e2m1_exponents, to_e2m1_groups, to_e4m3_blocks
from trtllm_ct.layouts.requantize_int4 import int4_to_e2m1_exponents, int4_to_e2m1_groups, int4_to_e4m3_blocks
from trtllm_ct.layouts.requantize_int4_tables import WORD
from trtllm_ct.layouts.stored_array import StoredArray, numpy_dtype, scalar
from trtllm_ct.plan.ops import Operation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trtllm_ct.engine.requantization import Form
    from trtllm_ct.formats.base import Codes
    from trtllm_ct.plan.ops import ModuleTensors

__all__ = ["GivenScale", "GlobalScale", "RoundedCodes", "RoundedScale"]

_ROWS_AT_ONCE = 128
"""The rows of a weight that are held as float32 at once: those of one row of blocks."""

_LEAST_OF_NVFP4 = 6 * 2.0**-9 * NVFP4_GLOBAL_SCALE
"""Where no magnitude reaches this, all groups have the smallest scale, and the limit of the form does not hold."""

_LARGEST_NUMBER, _LARGEST_WITH_ZERO_POINTS = 8, 15
"""The largest magnitudes of the difference of an int4 code and its zero point."""

_VALUES_OF_INT4 = {
    DType.F8_E4M3: (_LEAST_OF_NVFP4, LARGEST_OF_NVFP4 * NVFP4_GLOBAL_SCALE),
    DType.U8: (2.0**-40, 2.0**43),
    DType.F32: (2.0**-40, 2.0**43),
}
"""The smallest scale and the largest magnitude of int4 weights that are rounded by their codes, by a form's scales.

Beyond those for NVFP4, values may have to be refused; beyond the others, squared errors may leave float32's range.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedCodes(Operation):
    """Delivers the codes of a weight that was rounded to `form`."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "round to codes"
    form: Form

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the codes in the dtype of `result`; values that are not finite, or beyond the form, are an error."""
        return _as_stored(_rounded(name, module, self.form)[0], self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedScale(Operation):
    """Delivers the scales of a weight that was rounded to `form`."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "scale of rounded codes"
    form: Form

    def run(self, name: str, module: ModuleTensors) -> StoredArray:
        """Return the scales in the dtype of `result`; values that are not finite, or beyond the form, are an error."""
        return _as_stored(_rounded(name, module, self.form)[1], self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalScale(Operation):
    """Delivers the global scale of weights that were rounded to NVFP4, float32 []."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "global scale"

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return `NVFP4_GLOBAL_SCALE`."""
        return scalar(NVFP4_GLOBAL_SCALE).reshape()


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenScale(Operation):
    """Delivers the static scale of a module's input, float32 []; it was given beside the checkpoint."""

    exact: ClassVar[bool] = False
    label: ClassVar[str] = "scale of a calibration"
    value: float

    def run(self, name: str, module: ModuleTensors) -> StoredArray:  # noqa: ARG002
        """Return `value`, rounded once."""
        return scalar(self.value).reshape()


def _rounded(name: str, module: ModuleTensors, form: Form) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Return codes and scales of a module's weight in a form, computed once for both."""
    known = module.results.get(form.name)
    if known is None:
        known = module.results[form.name] = _round(name, module, form)
    return known


def _round(name: str, module: ModuleTensors, form: Form) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Round a weight to codes and scales, some rows at a time where it is dequantized first."""
    import numpy as np

    if _is_rounded_by_codes(module, form):
        return _codes_to_form(module.codes, form)
    parts = []
    values = module.dequantize(DType.F32).elements
    _refuse_small(name, values, form)
    for first in range(0, max(values.shape[0], 1), _ROWS_AT_ONCE):
        rows = values[first : first + _ROWS_AT_ONCE]
        _refuse(name, rows, module.first_row + first, form)
        parts.append(_to_form(rows, form))
    codes, scales = (np.concatenate([part[index] for part in parts]) for index in (0, 1))
    return codes, scales


def _is_rounded_by_codes(module: ModuleTensors, form: Form) -> bool:
    """Whether a weight is one of int4 codes that are rounded to a form without being dequantized.

    One scale beyond `_VALUES_OF_INT4`, such as 0 or NaN, or one zero point that is no code leaves the whole weight to
    its values.
    """
    codes, (rows, columns) = module.codes, module.codes.shape
    scale, group = codes.scale, module.weight.group_columns or columns
    int4 = codes.packing == packed_words(4) and codes.element is Element.INT and _zero_points_are_codes(codes)
    if (
        not int4
        or codes.divisor is not None
        or codes.group_index is not None
        or scale.dtype is not DType.BF16
        or not rows * columns
    ):
        return False
    # All groups of a row have the same size: a smaller one at its end is left to values.
    if scale.shape != (rows, columns // group) or columns % group or group % _unit_of_columns(form):
        return False
    least, most = _VALUES_OF_INT4[form.scale_dtype]
    numbers, largest = scale.numbers, _LARGEST_NUMBER if codes.zero_point is None else _LARGEST_WITH_ZERO_POINTS
    return bool(numbers.min() >= least and numbers.max() <= most / largest)


def _zero_points_are_codes(codes: Codes) -> bool:
    """Whether int4 codes have no zero points, or only such as are codes too; those that are packed always are."""
    if codes.zero_point is None or codes.zero_point_packing is not None:
        return True
    zero_point = codes.zero_point.elements
    return bool(zero_point.min(initial=0) >= -8 and zero_point.max(initial=0) <= 7)


def _unit_of_columns(form: Form) -> int:
    """Return what the columns of a stored scale have to be a multiple of."""
    return form.weights.group_size or WORD


def _block(form: Form, columns: int) -> tuple[int, int]:
    """Return the rows and the columns that have the same scale, of a weight with so many columns."""
    return form.weights.block_structure or (1, form.weights.group_size or columns)


def _codes_to_form(codes: Codes, form: Form) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Round int4 codes to codes and scales."""
    words, bits, zero_point = codes.values.elements[: codes.shape[0]], codes.scale.elements, codes.plain_zero_point
    # Codes are in offset binary, so that of 0 is 8.
    zeros = None if zero_point is None else (zero_point + zero_point.dtype.type(8)).view("u1")
    if form.scale_dtype is DType.F8_E4M3:
        return int4_to_e2m1_groups(words, bits, zeros, NVFP4_GLOBAL_SCALE)
    if form.scale_dtype is DType.U8:
        return int4_to_e2m1_exponents(words, bits, zeros)
    return int4_to_e4m3_blocks(words, bits, zeros, _block(form, codes.shape[1]), powers_of_two=form.powers_of_two)


def _to_form(values: NDArray[np.float32], form: Form) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Round rows [n, K] to codes and scales; `n` is at most the height of a block."""
    block = _block(form, values.shape[1])
    if form.scale_dtype is DType.F8_E4M3:
        return to_e2m1_groups(values, block[1], NVFP4_GLOBAL_SCALE)
    if form.scale_dtype is DType.U8:
        return to_e2m1_exponents(values, block[1])
    return to_e4m3_blocks(values, block, powers_of_two=form.powers_of_two)


def _refuse(name: str, values: NDArray[np.float32], first_row: int, form: Form) -> None:
    """Raise `PayloadError` for a value that is not finite, or too large for the form."""
    import numpy as np

    limited = form.scale_dtype is DType.F8_E4M3
    # A sum takes a fraction of the time, and is not finite where a value isn't; large values may overflow it too.
    with np.errstate(over="ignore", invalid="ignore"):
        if not limited and np.isfinite(values.sum()):
            return
    limit = LARGEST_OF_NVFP4 * NVFP4_GLOBAL_SCALE if limited else float(np.finfo("f4").max)
    largest = float(np.abs(values).max(initial=0))
    if largest <= limit:
        return
    row, column = (int(index) for index in np.argwhere(~(np.abs(values) <= limit))[0])
    raise PayloadError(
        Fault(
            where=f"{name}[{first_row + row}, {column}]",
            expected=f"magnitudes up to {limit:g}, which {form.name} holds",
            found=f"{values[row, column]:g}",
            remedy="Requantize to another form, such as fp8-block, or let these modules be dequantized.",
        )
    )


def _refuse_small(name: str, values: NDArray[np.float32], form: Form) -> None:
    """Raise `PayloadError` for a weight, or rows of one, whose values NVFP4 would round to few codes or to zeros."""
    if form.scale_dtype is not DType.F8_E4M3:
        return
    largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
    if 0 < largest < _LEAST_OF_NVFP4:
        raise PayloadError(
            Fault(
                where=name,
                expected=f"a largest magnitude of at least {_LEAST_OF_NVFP4:.2g}: {form.name} has one global scale",
                found=f"{largest:g}",
                remedy="Requantize to another form, such as fp8-block, or let these modules be dequantized.",
            )
        )


def _as_stored(array: NDArray[np.generic], operation: Operation) -> StoredArray:
    """Return an array as the tensor that an operation delivers; nothing is copied."""
    spec = operation.result
    return StoredArray(array.view(numpy_dtype(spec.dtype)), spec.dtype).reshape(*spec.shape)
