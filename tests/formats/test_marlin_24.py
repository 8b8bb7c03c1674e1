from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from on_tensors import NATIVE, Codes, decode, encode, on_tensors
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PayloadError
from trtllm_ct.base.schemes import NumberType, QuantArgs, Strategy, TensorSpec
from trtllm_ct.formats import FORMATS, format_for
from trtllm_ct.formats.marlin_24 import MARLIN_24
from trtllm_ct.layouts import packing as packing_layout
from trtllm_ct.layouts.packing import INT8_PLAIN, packed_words

if TYPE_CHECKING:
    from trtllm_ct.formats.base import StoredSpecs, StoredWeight, Version

pack_codes = on_tensors(packing_layout.pack_codes)

INT4_CHANNEL = QuantArgs(num_bits=4, strategy=Strategy.CHANNEL)
INT8_CHANNEL = replace(INT4_CHANNEL, num_bits=8)
INT4_GROUP = QuantArgs(num_bits=4, strategy=Strategy.GROUP, group_size=128)
INT8_GROUP = replace(INT4_GROUP, num_bits=8)

NEW, OLD = (0, 14, 0), (0, 6)

Sized = tuple[DType, tuple[int, ...]]


def specs(**tensors: Sized | None) -> StoredSpecs:
    """Headers of an int4 weight [128, 512] with groups of 128, with changes; None leaves a tensor out."""
    whole: dict[str, Sized | None] = {
        "weight_packed": (DType.I32, (16, 256)),
        "scale_packed": (DType.F16, (4, 128)),
        "meta": (DType.I16, (16, 256)),
    }
    return {name: TensorSpec(*entry) for name, entry in (whole | tensors).items() if entry is not None}


def specs_of(tensors: dict[str, Tensor]) -> StoredSpecs:
    return {name: TensorSpec(DType.from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}


def described(args: QuantArgs, stored: StoredSpecs, version: Version = NEW) -> StoredWeight:
    faults = FaultCollector()
    weight = MARLIN_24.describe("m.lin", args, stored, None, faults, version)
    assert not faults.faults
    assert weight is not None
    return weight


def decoded(args: QuantArgs, tensors: dict[str, Tensor], version: Version = NEW) -> Codes:
    weight = described(args, specs_of(tensors), version)
    return decode(weight, tensors)


def random_codes(args: QuantArgs, shape: tuple[int, int], seed: int = 0) -> Codes:
    """Codes with at most two nonzero values in each four columns, and scales that all differ."""
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (args.num_bits - 1)
    kept = torch.rand((shape[0], shape[1] // 4, 4), generator=generator).argsort(dim=2) < 2
    values = torch.randint(-half, half, shape, dtype=torch.int8, generator=generator) * kept.view(shape)
    groups = -(-shape[1] // args.group_size) if args.group_size else 1
    scale = torch.arange(1, shape[0] * groups + 1).view(shape[0], groups).to(torch.float16) / 64
    return Codes(values=values, packing=INT8_PLAIN, shape=shape, scale=scale)


def vector(columns: int, modulus: int) -> Codes:
    """q[n, k] = (n + 3 k) mod modulus + 1 at the first and the third of each four columns, N = 64, scale 1."""
    row, column = torch.arange(64)[:, None], torch.arange(columns)[None]
    values = torch.where(column % 4 % 2 == 0, (row + 3 * column) % modulus + 1, 0).to(torch.int8)
    return Codes(values=values, packing=INT8_PLAIN, shape=(64, columns), scale=torch.ones((64, 1)))


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


# compressed-tensors 0.14: first bytes of the words, and the SHA-256 of all of them.
VECTORS = {
    "int4, K = 32": (INT4_CHANNEL, 32, 7, (1, 128), "f9cdefbc9adef9cdabef9adebcf9abef", "771576e9aaa1b4db"),
    "int4, K = 64": (INT4_CHANNEL, 64, 7, (2, 128), "f9cdefbc9adef9cdabef9adebcf9abef", "e7aeec49800009e3"),
    "int8, K = 128": (INT8_CHANNEL, 128, 120, (4, 256), "81b187b785b58bbb82b288b886b68cbc", "4fedb4504674d637"),
}


@pytest.mark.parametrize(
    ("args", "columns", "modulus", "shape", "start", "sha256"), VECTORS.values(), ids=VECTORS.keys()
)
def test_worked_words(
    args: QuantArgs, columns: int, modulus: int, shape: tuple[int, int], start: str, sha256: str
) -> None:
    codes = vector(columns, modulus)

    tensors = encode(MARLIN_24, codes, args)

    words = tensors["weight_packed"]
    assert words.dtype == torch.int32
    assert words.shape == shape
    assert words.numpy().tobytes()[:16].hex() == start
    assert digest(words) == sha256
    assert torch.equal(decoded(args, tensors).values, codes.values)


def test_worked_positions_and_scales() -> None:
    tensors = encode(MARLIN_24, vector(32, 7), INT4_CHANNEL)

    assert tensors["meta"].dtype == torch.int16
    assert tensors["meta"].shape == (1, 128)
    assert set(tensors["meta"].view(torch.uint16).flatten().tolist()) == {0x8888}
    assert digest(tensors["meta"]) == "1bf2fb9c5ab88aeb"
    assert tensors["scale_packed"].numpy().tobytes().hex() == "003c" * 64


@pytest.mark.parametrize(
    ("args", "columns", "version", "start"),
    [
        (INT4_GROUP, 512, (0, 14, 0), [1, 5, 2, 6, 3, 7, 4, 8, 9, 13, 10, 14]),
        (INT4_GROUP, 512, (0, 8, 0), [1, 5, 2, 6, 3, 7, 4, 8, 9, 13, 10, 14]),
        (INT4_GROUP, 512, (), [1, 5, 2, 6, 3, 7, 4, 8, 9, 13, 10, 14]),
        (INT4_GROUP, 512, (0, 7, 1), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (INT4_GROUP, 512, (0, 6), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (INT4_GROUP, 256, (0, 14, 0), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (INT4_CHANNEL, 512, (0, 14, 0), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (INT8_GROUP, 512, (0, 14, 0), [1, 5, 2, 6, 3, 7, 4, 8, 9, 13, 10, 14]),
    ],
    ids=["0.14", "0.8", "unknown", "0.7", "0.6", "half of K", "channel", "int8"],
)
def test_the_order_of_scales_depends_on_the_writer(
    args: QuantArgs, columns: int, version: Version, start: list[int]
) -> None:
    """With scale[n] = n + 1: since 0.8.0 scales are interleaved if groups are shorter than K / 2."""
    groups = columns // (args.group_size or columns)
    scale = torch.arange(1.0, 65.0)[:, None].expand(64, groups).to(torch.float16)
    codes = replace(random_codes(args, (64, columns)), scale=scale)
    weight = described(args, specs_of(encode(MARLIN_24, codes, args)), version)

    tensors = encode(weight.format, codes, args)

    assert tensors["scale_packed"].shape == (groups, 64)
    assert tensors["scale_packed"][0, :12].tolist() == start
    assert torch.equal(decoded(args, tensors, version).scale, scale)


@given(
    st.sampled_from([INT4_CHANNEL, INT8_CHANNEL, INT4_GROUP, INT8_GROUP, replace(INT4_GROUP, group_size=32)]),
    st.sampled_from([(64, 128), (64, 512), (192, 384)]),
    st.sampled_from([NEW, OLD]),
    st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None)
def test_decoding_inverts_encoding(args: QuantArgs, shape: tuple[int, int], version: Version, seed: int) -> None:
    codes = random_codes(args, shape, seed)
    entry = described(args, specs_of(encode(MARLIN_24, codes, args)), version).format

    restored = decoded(args, encode(entry, codes, args), version)

    assert restored.packing == INT8_PLAIN
    assert restored.shape == shape
    assert restored.zero_point is None
    assert torch.equal(restored.values, codes.values)
    assert torch.equal(restored.scale, codes.scale)
    assert restored.scale.dtype == torch.float16
    assert restored.values.is_contiguous()
    assert restored.scale.is_contiguous()


def test_codes_may_come_packed() -> None:
    codes = random_codes(INT4_CHANNEL, (64, 64))
    words = packed_words(4)
    packed = replace(codes, values=pack_codes(codes.values, words), packing=words)
    for name, tensor in encode(MARLIN_24, packed, INT4_CHANNEL).items():
        assert torch.equal(tensor, encode(MARLIN_24, codes, INT4_CHANNEL)[name])


def test_dequantizing_multiplies_codes_by_scales() -> None:
    codes = random_codes(INT4_GROUP, (64, 512))
    tensors = encode(MARLIN_24, codes, INT4_GROUP)
    weight = described(INT4_GROUP, specs_of(tensors))

    values = NATIVE.dequantize(weight, tensors, torch.float32)

    assert torch.equal(values, codes.values.float() * codes.scale.float().repeat_interleave(128, dim=1))


def test_the_description_from_headers() -> None:
    weight = described(INT4_GROUP, specs())
    assert weight.format is MARLIN_24
    assert weight.shape == (128, 512)
    assert weight.scale == "scale_packed"
    assert weight.scale_shape == (128, 4)
    assert weight.consumed == ("weight_packed", "scale_packed", "meta")
    assert not weight.has_zero_point


@pytest.mark.parametrize("args", [INT4_CHANNEL, INT8_GROUP], ids=QuantArgs.label)
def test_the_words_of_pack_quantized_are_another_format(args: QuantArgs) -> None:
    """Both formats call the words `weight_packed`; only marlin-24 has a `scale_packed`."""
    plain = {"weight_packed": TensorSpec(DType.I32, (64, 8)), "weight_scale": TensorSpec(DType.F16, (64, 1))}
    for stored, name in ((plain, "pack-quantized"), (specs(), "marlin-24"), (specs(meta=None), "marlin-24")):
        assert [entry.name for entry in FORMATS if entry.accepts(args, stored)] == [name]
    assert format_for(replace(args, type=NumberType.FLOAT), specs()) is None


@pytest.mark.parametrize(
    ("args", "change", "message"),
    [
        (INT4_GROUP, {"meta": None}, "m.lin.meta: expected int16 [16, 256] beside the codes, found no such tensor"),
        (INT4_GROUP, {"meta": (DType.I32, (16, 256))}, "m.lin.meta: expected int16 [16, 256] beside the codes, found"),
        (INT4_GROUP, {"meta": (DType.I16, (16, 128))}, "m.lin.meta: expected int16 [16, 256]"),
        (
            INT4_GROUP,
            {"scale_packed": (DType.F16, (128, 4))},
            "m.lin.scale_packed: expected float16 [4, 128] beside the codes, found float16 [128, 4]",
        ),
        (INT4_CHANNEL, {}, "m.lin.scale_packed: expected float16 [1, 128]"),
        (INT8_GROUP, {"meta": (DType.I16, (16, 128))}, "m.lin.scale_packed: expected float16 [4, 64]"),
        (
            INT4_CHANNEL,
            {
                "weight_packed": (DType.I32, (16, 64)),
                "scale_packed": (DType.F16, (1, 32)),
                "meta": (DType.I16, (16, 64)),
            },
            "m.lin.weight_packed: expected int32 words in a multiple of 128 columns for 4 bits, found int32 [16, 64]",
        ),
        (INT4_GROUP, {"weight_packed": (DType.I32, (16,))}, "m.lin.weight_packed: expected a int32 matrix"),
        (replace(INT4_GROUP, symmetric=False), {}, "m.lin: expected symmetric int4 or int8 with strategy group or"),
        (replace(INT4_GROUP, num_bits=3), {}, "m.lin: expected symmetric int4 or int8"),
        (QuantArgs(num_bits=4), {}, "m.lin: expected symmetric int4 or int8"),
    ],
    ids=[
        "no meta",
        "meta of another dtype",
        "meta of another shape",
        "transposed scales",
        "channel",
        "another width",
        "32 rows",
        "vector",
        "asymmetric",
        "int3",
        "tensor",
    ],
)
def test_headers_that_contradict_the_scheme(args: QuantArgs, change: dict[str, Sized | None], message: str) -> None:
    faults = FaultCollector()
    MARLIN_24.describe("m.lin", args, specs(**change), None, faults, NEW)
    assert any(str(fault).startswith(message) for fault in faults.faults), [str(fault) for fault in faults.faults]


def test_a_weight_of_another_model() -> None:
    faults = FaultCollector()
    MARLIN_24.describe("m.lin", INT4_GROUP, specs(), (128, 256), faults, NEW)
    (fault,) = faults.faults
    assert fault.where == "m.lin"
    assert fault.found == "codes for [128, 512]"


@pytest.mark.parametrize("nibble", [0x0, 0x5, 0xA, 0xF, 0x1, 0x7])
def test_two_codes_in_one_position_are_refused(nibble: int) -> None:
    tensors = encode(MARLIN_24, vector(32, 7), INT4_CHANNEL)
    tensors["meta"][0, 0] = 0x0880 | nibble
    with pytest.raises(PayloadError, match=rf"two different positions.*found {nibble:04b} for row 0, columns 0 to 3"):
        decoded(INT4_CHANNEL, tensors)


def test_only_sparse_symmetric_codes_are_encoded() -> None:
    codes = vector(32, 7)
    with pytest.raises(ValueError, match="2:4"):
        encode(MARLIN_24, replace(codes, values=torch.ones((64, 32), dtype=torch.int8)), INT4_CHANNEL)
    with pytest.raises(ValueError, match="zero points"):
        encode(MARLIN_24, replace(codes, zero_point=torch.ones((64, 1), dtype=torch.int8)), INT4_CHANNEL)
