"""The compressed-tensors library in whichever release is installed: what it decodes equals this package's result.

With another release in front of the path, for example `PYTHONPATH=FOLDER`, the same tests run against that one. Scales
are powers of two, so that every result is exact in bfloat16 and no rounding hides a difference.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from on_tensors import LIBRARY, NATIVE, Codes, encode, on_tensors
from stored_weights import described, specs_of
from torch import Tensor

from trtllm_ct.base.schemes import NumberType, QuantArgs, Strategy
from trtllm_ct.formats import FORMATS, library
from trtllm_ct.formats.base import StoredWeight, scale_shape
from trtllm_ct.layouts.loops import dispatch as dispatch_layout
from trtllm_ct.layouts.packing import INT8_PLAIN

if TYPE_CHECKING:
    from collections.abc import Iterator

unpack_codes = on_tensors(dispatch_layout.unpack_codes)

INT, FLOAT = NumberType.INT, NumberType.FLOAT
TENSOR, CHANNEL, GROUP, BLOCK = Strategy.TENSOR, Strategy.CHANNEL, Strategy.GROUP, Strategy.BLOCK
PACKED, INT8, FLOAT8 = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP6, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"
# Releases up to 0.14 import parts of torch that torch itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
BY_NAME = {entry.name: entry for entry in FORMATS}
MICROSCALING_BITS = {NVFP4: 4, MXFP4: 4, MXFP6: 6, MXFP8: 8}


@dataclass(frozen=True)
class Case:
    """A kind of weight; `group_size` is of groups, and blocks are 16x16."""

    format: str
    bits: int
    strategy: Strategy
    zero_points: bool = False
    shape: tuple[int, int] = (40, 96)
    group_size: int | None = None

    @property
    def args(self) -> QuantArgs:
        return QuantArgs(
            num_bits=self.bits,
            type=INT if self.format in {PACKED, INT8} else FLOAT,
            symmetric=not self.zero_points,
            strategy=self.strategy,
            group_size=self.group_size,
            block_structure=(16, 16) if self.strategy is BLOCK else None,
            scale_dtype="uint8" if self.format in {MXFP4, MXFP6, MXFP8} else None,
        )

    def __str__(self) -> str:
        zero_points = "asymmetric" if self.zero_points else "symmetric"
        return f"{self.format} {self.bits} {self.strategy} {zero_points} {self.shape}"


def _all_cases() -> Iterator[Case]:
    for bits, zero_points in product(range(2, 9), (False, True)):
        yield Case(PACKED, bits, GROUP, zero_points, group_size=32)
        yield Case(PACKED, bits, GROUP, zero_points, group_size=96)
        yield Case(PACKED, bits, CHANNEL, zero_points, (39, 95))
        yield Case(PACKED, bits, TENSOR, zero_points, (39, 95))
    for name, shape in product((INT8, FLOAT8), ((40, 96), (1, 96), (39, 32))):
        for zero_points in (False, True) if name == INT8 else (False,):
            yield Case(name, 8, CHANNEL, zero_points, shape)
            yield Case(name, 8, TENSOR, zero_points, shape)
            yield Case(name, 8, GROUP, zero_points, shape, group_size=32)
    for name, shape in product((INT8, FLOAT8), ((32, 48), (40, 48), (32, 40), (32, 16), (2, 48))):
        yield Case(name, 8, BLOCK, shape=shape)
    for name, bits in MICROSCALING_BITS.items():
        size = 16 if name == NVFP4 else 32
        for columns in (size, 96):
            strategy = Strategy.TENSOR_GROUP if name == NVFP4 else GROUP
            yield Case(name, bits, strategy, shape=(40, columns), group_size=size)


CASES = list(_all_cases())


def stored_weight(case: Case, *, divisor: float = 4.0) -> tuple[StoredWeight, dict[str, Tensor]]:
    """A random weight of this kind, with its stored tensors."""
    generator = torch.Generator().manual_seed(0)
    args, (rows, columns) = case.args, case.shape
    size = scale_shape(args, case.shape)
    exponents = torch.randint(-3, 4, size, generator=generator)
    if case.format in {MXFP4, MXFP6, MXFP8}:
        scale = (exponents + 127).to(torch.uint8)
    else:
        scale = (2.0**exponents).to(torch.float8_e4m3fn if case.format == NVFP4 else torch.bfloat16)
    half = 1 << (case.bits - 1)
    stored = {"weight_scale": scale}
    if args.type is INT:
        codes = torch.randint(-half, half, case.shape, generator=generator, dtype=torch.int8)
        zero_point = torch.randint(-half, half, size, generator=generator, dtype=torch.int8)
        stored = encode(
            BY_NAME[case.format],
            Codes(
                values=codes,
                packing=INT8_PLAIN,
                shape=case.shape,
                scale=scale,
                zero_point=zero_point if case.zero_points else None,
            ),
            args,
        )
    elif case.bits == 8:
        stored["weight"] = (torch.randn(case.shape, generator=generator) * 50).to(torch.float8_e4m3fn)
    else:
        packed = (rows, columns * case.bits // 8)
        stored["weight_packed"] = torch.randint(0, 256, packed, generator=generator, dtype=torch.uint8)
    if case.format == NVFP4:
        stored["weight_global_scale"] = torch.tensor([divisor])
    return described(BY_NAME[case.format], args, specs_of(stored), case.shape), stored


def plain(codes: Codes) -> Tensor:
    return codes.values if codes.packing is None else unpack_codes(codes.values, codes.packing, codes.shape)


@pytest.fixture(autouse=True)
def fresh_line() -> Iterator[None]:
    library.installed_line.cache_clear()
    yield
    library.installed_line.cache_clear()


@pytest.mark.any_library
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_installed_release_gives_what_this_package_gives(case: Case) -> None:
    weight, stored = stored_weight(case)
    codes, expected = LIBRARY.decode(weight, stored), NATIVE.decode(weight, stored)

    assert torch.equal(plain(codes).view(torch.uint8), plain(expected).view(torch.uint8))
    zero_point, expected_zero_point = codes.plain_zero_point, expected.plain_zero_point
    assert (zero_point is None) is (expected_zero_point is None)
    if zero_point is not None and expected_zero_point is not None:
        assert torch.equal(zero_point.reshape(-1), expected_zero_point.reshape(-1))
    assert torch.equal(
        LIBRARY.dequantize(weight, stored, torch.bfloat16), NATIVE.dequantize(weight, stored, torch.bfloat16)
    )


@pytest.mark.any_library
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_library_is_asked_for_what_its_line_reads_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    weight, stored = stored_weight(case)
    calls: list[str] = []
    decompress = library.decompress

    def noted(asked: StoredWeight, *arguments: Any) -> Any:
        calls.append(asked.format.name)
        return decompress(asked, *arguments)

    monkeypatch.setattr(library, "decompress", noted)

    LIBRARY.dequantize(weight, stored, torch.bfloat16)

    assert calls == ([case.format] if library.installed_line().reads(weight) else [])


@pytest.mark.any_library
def test_an_expert_without_calibration_is_zeros_with_every_release() -> None:
    weight, stored = stored_weight(Case(NVFP4, 4, Strategy.TENSOR_GROUP, group_size=16), divisor=0.0)

    assert torch.equal(LIBRARY.dequantize(weight, stored, torch.bfloat16), torch.zeros(40, 96, dtype=torch.bfloat16))


SINCE = {
    Case(PACKED, 4, GROUP, group_size=32): "0.9.0",
    Case(INT8, 8, CHANNEL, zero_points=True): "0.9.0",
    Case(FLOAT8, 8, TENSOR): "0.9.0",
    Case(PACKED, 4, TENSOR, zero_points=True): "0.9.0",
    Case(PACKED, 4, GROUP, zero_points=True, group_size=32): "0.13.0",
    Case(PACKED, 8, CHANNEL, zero_points=True): "0.13.0",
    Case(MXFP8, 8, GROUP, group_size=32): "0.15.0",
    Case(MXFP4, 4, GROUP, group_size=32): "0.16.0",
    Case(PACKED, 3, GROUP, group_size=32): "0.18.0",
    Case(PACKED, 6, CHANNEL): "0.18.0",
    Case(FLOAT8, 8, BLOCK): "0.19.0",
    Case(INT8, 8, BLOCK): "0.19.0",
    Case(MXFP6, 6, GROUP, group_size=32): "0.20.0",
}
RELEASES = (
    *("0.9.0", "0.9.4", "0.10.2", "0.11.0", "0.12.2", "0.13.0", "0.14.0", "0.14.0.1", "0.15.0", "0.15.0.1"),
    *("0.16.0", "0.17.1", "0.18.0", "0.19.0", "0.20.0", "0.21.0", "1.0"),
)


@pytest.mark.parametrize("release", RELEASES)
def test_each_release_reads_what_was_found_to_be_right(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: release)
    line = library.installed_line()

    for case, since in SINCE.items():
        weight, _ = stored_weight(case)
        assert line.reads(weight) is (RELEASES.index(release) >= RELEASES.index(since)), case
    nvfp4, _ = stored_weight(Case(NVFP4, 4, Strategy.TENSOR_GROUP, group_size=16))
    assert line.reads(nvfp4) is (release not in {"0.9.0", "0.9.4", "0.13.0"})
