"""What the library codec leaves to this package beside an older release of compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from on_tensors import LIBRARY, NATIVE, Codes, encode
from stored_weights import described, specs_of

from trtllm_ct.base.schemes import NumberType, QuantArgs, Strategy
from trtllm_ct.formats import library
from trtllm_ct.formats.library import LINES
from trtllm_ct.formats.mxfp4 import MXFP4
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.layouts.packing import INT8_PLAIN

ROWS, COLUMNS = 6, 64


def integers(bits: int) -> Codes:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(-half, half, (ROWS, COLUMNS), generator=generator, dtype=torch.int8)
    scale = torch.rand(ROWS, COLUMNS // 32, generator=generator)
    return Codes(values=values, packing=INT8_PLAIN, shape=(ROWS, COLUMNS), scale=scale)


@pytest.fixture
def older_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Release 0.15, whose decoders raise here."""

    def decoder_is_called(*_: object) -> object:
        raise RuntimeError("the library's decoder is called")

    monkeypatch.setattr(library, "installed_line", lambda: next(line for line in LINES if line.since == (0, 15)))
    monkeypatch.setattr(library, "decompress", decoder_is_called)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_codes_that_straddle_words_are_decoded_here(older_library: None, bits: int) -> None:
    """0.15 unpacks them as words that are padded at their end, without an error."""
    args = QuantArgs(num_bits=bits, strategy=Strategy.GROUP, group_size=32)
    stored = encode(PACKED_INT, integers(bits), args)
    weight = described(PACKED_INT, args, specs_of(stored), (ROWS, COLUMNS))

    assert torch.equal(
        LIBRARY.dequantize(weight, stored, torch.float32), NATIVE.dequantize(weight, stored, torch.float32)
    )


def test_mxfp4_is_decoded_here(older_library: None) -> None:
    """0.15 raises NotImplementedError."""
    args = QuantArgs(num_bits=4, type=NumberType.FLOAT, strategy=Strategy.GROUP, group_size=32, scale_dtype="uint8")
    generator = torch.Generator().manual_seed(0)
    stored = {
        "weight_packed": torch.randint(0, 256, (ROWS, COLUMNS // 2), generator=generator, dtype=torch.uint8),
        "weight_scale": torch.randint(120, 130, (ROWS, COLUMNS // 32), generator=generator, dtype=torch.uint8),
    }
    weight = described(MXFP4, args, specs_of(stored), (ROWS, COLUMNS))

    assert torch.equal(
        LIBRARY.dequantize(weight, stored, torch.bfloat16), NATIVE.dequantize(weight, stored, torch.bfloat16)
    )


@pytest.mark.library
def test_integers_of_whole_widths_are_left_to_it(older_library: None) -> None:
    args = QuantArgs(num_bits=4, strategy=Strategy.GROUP, group_size=32)
    stored = encode(PACKED_INT, integers(4), args)
    weight = described(PACKED_INT, args, specs_of(stored), (ROWS, COLUMNS))

    with pytest.raises(RuntimeError, match="decoder is called"):
        LIBRARY.dequantize(weight, stored, torch.float32)


@pytest.mark.newest_library
@pytest.mark.parametrize("columns", [64, 48], ids=["full groups", "the last group is not full"])
def test_small_floats_are_unpacked_by_it(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Unpacking knows no groups, so that a last group that is not full makes no difference."""
    from compressed_tensors.compressors.nvfp4 import helpers

    args = QuantArgs(num_bits=4, type=NumberType.FLOAT, strategy=Strategy.GROUP, group_size=32, scale_dtype="uint8")
    stored = {
        "weight_packed": torch.arange(ROWS * columns // 2).reshape(ROWS, -1).to(torch.uint8),
        "weight_scale": torch.full((ROWS, 2), 127, dtype=torch.uint8),
    }
    weight = described(MXFP4, args, specs_of(stored), (ROWS, columns))
    calls: list[tuple[int, int]] = []
    unpack = helpers.unpack_fp4_from_uint8

    def noted(packed: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        calls.append((rows, capacity))
        return unpack(packed, rows, capacity)

    monkeypatch.setattr(helpers, "unpack_fp4_from_uint8", noted)

    assert torch.equal(LIBRARY.decode(weight, stored).values, NATIVE.decode(weight, stored).values)
    assert calls == [(ROWS, columns)]
