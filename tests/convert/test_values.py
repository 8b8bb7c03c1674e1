"""Compiled loops and the operations of numpy give the same bytes and faults, with tiles of any size."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, rewrite, tiny_config, write_checkpoint
from fresh_python import run_python
from oracles import round_once
from safetensors.torch import load_file
from stored_schemes import SCHEMES

from trtllm_ct.base.errors import CatalogError, TrtllmCtError
from trtllm_ct.convert import tiles as tiles_module
from trtllm_ct.convert.convert import convert_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIG = tiny_config(hidden=256, intermediate=512, layers=1)
"""A model whose rows are multiples of 256, for groups of 256."""

SCALE = "model.layers.0.mlp.down_proj.weight_scale"
SHAPE = "model.layers.0.mlp.down_proj.weight_shape"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def converted(built: Built, out: Path, monkeypatch: pytest.MonkeyPatch, *, by_numpy: bool, **options: Any) -> Any:
    """Convert and return the files of the output, or the type and the faults of the error."""
    with monkeypatch.context() as patch:
        patch.setattr("trtllm_ct.layouts.loops.dispatch._MIN_CODES", 1 << 60 if by_numpy else 0)
        try:
            convert_checkpoint(built.directory, out, **options)
        except TrtllmCtError as error:
            return type(error), error.faults
    return content(out)


def both(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any]:
    """Return the results of a conversion with compiled loops and of one with the operations of numpy."""
    of_loops, of_numpy = (
        converted(built, tmp_path / name, monkeypatch, by_numpy=name == "numpy", **options)
        for name in ("loops", "numpy")
    )
    return of_loops, of_numpy


TILES = {"tiles": 64, "whole": tiles_module.TILE_BYTES}
"""The bytes of a tile: one row, and all rows."""


@pytest.fixture(params=TILES.values(), ids=TILES)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with one row per tile, and with all rows in one tile."""
    monkeypatch.setattr(tiles_module, "TILE_BYTES", request.param)


@pytest.mark.parametrize("to", ["modelopt", "dense"])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_the_bytes_are_the_same(scheme: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one row per tile, and with all rows in one tile."""
    built = write_checkpoint(tmp_path / "source", scheme=scheme, config=CONFIG)
    of_numpy = converted(built, tmp_path / "numpy", monkeypatch, by_numpy=True, to=to)

    assert isinstance(of_numpy, dict)
    for tiles, nbytes in TILES.items():
        monkeypatch.setattr(tiles_module, "TILE_BYTES", nbytes)
        assert converted(built, tmp_path / tiles, monkeypatch, by_numpy=False, to=to) == of_numpy, tiles


@pytest.mark.usefixtures("tiles")
def test_a_last_block_that_is_not_whole_has_its_own_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 rows are one block of 128 and a part of the next, whose row of scales the last tile must reach."""
    built = write_checkpoint(tmp_path / "source", scheme="fp8-block", config=tiny_config(intermediate=200))

    of_loops, of_numpy = both(built, tmp_path, monkeypatch, to="dense")

    assert of_loops == of_numpy
    name = "model.layers.0.mlp.gate_proj.weight"
    dense = load_file(tmp_path / "loops" / "model.safetensors")[name]
    assert torch.equal(dense, round_once(built.dense[name], torch.bfloat16))


@pytest.fixture(scope="module")
def imports_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Whether torch is imported after each conversion; all of them run in one process, in this order."""
    folder = tmp_path_factory.mktemp("loops")
    for scheme in sorted(SCHEMES):
        write_checkpoint(folder / scheme, scheme=scheme, config=CONFIG)
    done = run_python(
        """
        import json, sys
        from pathlib import Path
        from trtllm_ct import convert_checkpoint

        folder, *schemes = sys.argv[1:]
        imported = {}
        for scheme in schemes:
            for to in ("modelopt", "dense"):
                convert_checkpoint(Path(folder, scheme), Path(folder, f"{scheme} {to}"), to=to)
                imported[f"{scheme} {to}"] = "torch" in sys.modules
        print(json.dumps(imported))
        """,
        folder,
        *sorted(SCHEMES),
    )
    imported: dict[str, bool] = json.loads(done.stdout)
    return imported


@pytest.mark.parametrize("to", ["modelopt", "dense"])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_scheme_is_converted_without_torch(scheme: str, to: str, imports_of: dict[str, bool]) -> None:
    assert imports_of[f"{scheme} {to}"] is False


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["int4-g64", "int8-plain-channel", "int4-tensor"])
def test_scales_of_any_dtype_are_widened_bit_for_bit(
    scheme: str, scale_dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Subnormal and very large scales, zero, and negative zero."""

    def extreme(stored: dict[str, torch.Tensor]) -> None:
        flat = stored[SCALE].view(-1)
        numbers = torch.finfo(scale_dtype)
        values = [0.0, numbers.smallest_normal / 4, numbers.max / 64, -0.0]
        flat[:4] = torch.tensor(values if len(flat) > 1 else values[1:2], dtype=torch.float64)

    built = write_checkpoint(tmp_path / "source", scheme=scheme, scale_dtype=scale_dtype, edit=extreme)

    of_loops, of_numpy = both(built, tmp_path, monkeypatch)

    assert isinstance(of_loops, dict)
    assert of_loops == of_numpy


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["int4-g32", "int6-channel", "int8-plain-tensor", "fp8-block", "fp8-weight-only"])
def test_weights_are_rounded_in_the_same_way(
    scheme: str, scale_dtype: torch.dtype, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every dtype of scales and every dtype of weights, with one row per tile and with all rows in one tile."""

    def extreme(stored: dict[str, torch.Tensor]) -> None:
        flat = stored[SCALE].view(-1)
        flat[:2] = torch.tensor([torch.finfo(scale_dtype).smallest_normal / 2, 0.0])[: len(flat)]

    config = CONFIG | {"dtype": dtype}
    built = write_checkpoint(tmp_path / "source", scheme=scheme, scale_dtype=scale_dtype, config=config, edit=extreme)
    of_numpy = converted(built, tmp_path / "numpy", monkeypatch, by_numpy=True, to="dense")

    assert isinstance(of_numpy, dict)
    for tiles, nbytes in TILES.items():
        monkeypatch.setattr(tiles_module, "TILE_BYTES", nbytes)
        assert converted(built, tmp_path / tiles, monkeypatch, by_numpy=False, to="dense") == of_numpy, tiles


@pytest.mark.parametrize(("share", "fits"), [(1.0, False), (0.126, False), (0.124, True)])
@pytest.mark.parametrize(("dtype", "scale_dtype"), [("bfloat16", torch.float32), ("float16", torch.float16)])
def test_a_weight_that_overflows_is_a_fault(
    dtype: str, scale_dtype: torch.dtype, share: float, *, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of int4 reach -8, so a scale above an eighth of the largest number overflows."""
    largest = torch.finfo(getattr(torch, dtype)).max
    built = write_checkpoint(
        tmp_path / "source", scheme="int4-g32", scale_dtype=scale_dtype, config=CONFIG | {"dtype": dtype}
    )
    rewrite(built.directory, lambda stored: stored[SCALE].fill_(share * largest))

    of_loops, of_numpy = both(built, tmp_path, monkeypatch, to="dense")

    assert of_loops == of_numpy
    assert isinstance(of_loops, dict) is fits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1.0, -1e-30])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["int4-g64", "fp8-tensor-token", "int8-plain-channel"])
def test_bad_scales_are_the_same_faults(
    scheme: str, scale_dtype: torch.dtype, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = write_checkpoint(tmp_path / "source", scheme=scheme, scale_dtype=scale_dtype)

    def spoil(stored: dict[str, torch.Tensor]) -> None:
        stored[SCALE].view(-1)[-1] = value

    rewrite(built.directory, spoil)
    of_loops, of_numpy = both(built, tmp_path, monkeypatch)

    assert of_loops == of_numpy
    # In float16, -1e-30 rounds to minus zero.
    is_zero = scale_dtype is torch.float16 and value == -1e-30
    assert isinstance(of_loops, tuple) is (not is_zero or scheme == "fp8-tensor-token")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, -0.0, 1e-5])
def test_input_scales_are_checked_too(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = write_checkpoint(tmp_path / "source", scheme="fp8-tensor-static")
    rewrite(built.directory, lambda stored: stored[SCALE.replace("weight", "input")].fill_(value))

    of_loops, of_numpy = both(built, tmp_path, monkeypatch)

    assert of_loops == of_numpy
    assert isinstance(of_loops, dict) is (value == 1e-5)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ["int4-channel", "fp8-tensor-token"])
def test_a_zero_scale_is_a_fault_only_for_a_whole_weight(
    scheme: str, scale_dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zero scale of one row is allowed."""
    built = write_checkpoint(tmp_path / "source", scheme=scheme, scale_dtype=scale_dtype)
    rewrite(built.directory, lambda stored: stored[SCALE].view(-1)[:1].zero_())

    of_loops, of_numpy = both(built, tmp_path, monkeypatch)

    assert of_loops == of_numpy
    assert isinstance(of_loops, tuple) is (scheme == "fp8-tensor-token")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("change", [0, 1])
def test_a_wrong_weight_shape_is_the_same_fault(
    dtype: torch.dtype, change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = write_checkpoint(tmp_path / "source", scheme="int4-g64")

    def edit(stored: dict[str, torch.Tensor]) -> None:
        stored[SHAPE] = (stored[SHAPE] + change).to(dtype)

    rewrite(built.directory, edit)
    of_loops, of_numpy = both(built, tmp_path, monkeypatch)

    assert of_loops == of_numpy
    assert isinstance(of_loops, tuple) is bool(change)


def test_payloads_need_not_be_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old writers don't align payloads."""
    built = write_checkpoint(tmp_path / "source", scheme="int4-g64")
    aligned = converted(built, tmp_path / "aligned", monkeypatch, by_numpy=False)
    file = built.directory / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + whole[8 : 8 + length] + b" " + whole[8 + length :])
    of_loops, of_numpy = both(built, tmp_path, monkeypatch)

    assert isinstance(of_loops, dict)
    assert of_loops == of_numpy == aligned


def test_a_file_that_was_truncated_during_the_conversion_is_named(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", scheme="int4-g64", config=tiny_config(layers=1))
    file = built.directory / "model.safetensors"

    def cut(_plan: object) -> Callable[[int], None]:
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size // 2)
        return lambda _nbytes: None

    with pytest.raises(CatalogError) as raised:
        convert_checkpoint(built.directory, tmp_path / "out", on_start=cut)

    assert all("model.safetensors" in fault.where for fault in raised.value.faults)
    assert "The file changed or vanished" in raised.value.faults[0].remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [2, 6, 10])
@pytest.mark.parametrize("scheme", ["int4-channel", "int8-channel"])
@pytest.mark.usefixtures("tiles")
def test_few_rows_are_enough(rows: int, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows than a tile has, and numbers of rows that are not powers of two."""
    config = tiny_config(layers=1, hidden=16, heads=2, kv_heads=1, intermediate=rows)
    built = write_checkpoint(tmp_path / "source", scheme=scheme, config=config)

    of_loops, of_numpy = both(built, tmp_path, monkeypatch)

    assert of_loops == of_numpy
