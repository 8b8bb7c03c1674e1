"""How far a verification is: every stored byte counts once, and once more when it is compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("to", [None, "modelopt", "dense", "engine"])
def test_all_bytes_are_done_at_the_end(tmp_path: Path, to: str | None) -> None:
    config = tiny_config(hidden=128, intermediate=128, dtype="float16")
    source = write_checkpoint(tmp_path / "in", config=config, scheme={"o_proj": "int4-g64", "down_proj": "int4-g64"})
    out = tmp_path / "out" if to else None
    if to:
        convert_checkpoint(source.directory, tmp_path / "out", to=to)
    totals: list[int] = []
    done: list[int] = []

    def on_start(total: int) -> Callable[[int], None]:
        totals.append(total)
        return done.append

    verify_checkpoint(source.directory, out, on_start=on_start)

    (total,) = totals
    assert total >= sum(path.stat().st_size for path in source.directory.glob("*.safetensors")) * 0.9
    assert len(done) > 10
    assert sum(done) == pytest.approx(total, rel=0.01)
