"""Tiles: a tensor that is converted some rows at a time has the same bytes as one that is converted whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import write_checkpoint

from trtllm_ct.convert import tiles
from trtllm_ct.convert.convert import convert_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("to", ["modelopt", "dense"])
@pytest.mark.parametrize("scheme", ["int4-g64", "int4-g64-asym", "int8-channel", "fp8-block", "nvfp4"])
def test_tiles_are_put_where_they_belong(scheme: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a delivered tensor may stand for several rows of the weight: two in each byte of int4 codes."""
    built = write_checkpoint(tmp_path / "in", scheme=scheme)

    def converted(name: str, tile_bytes: int) -> dict[str, bytes]:
        monkeypatch.setattr(tiles, "TILE_BYTES", tile_bytes)
        convert_checkpoint(built.directory, tmp_path / name, to=to)
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}

    assert converted("tiles", 512) == converted("whole", 2**30)
