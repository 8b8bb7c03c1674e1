"""What tests of conversions share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hub_server import HubServer, hub_at, serving

from trtllm_ct.checkpoint.hub import ranges
from trtllm_ct.convert import units

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Units of a module or two, so that each shard serves several."""
    monkeypatch.setattr(ranges.time, "sleep", lambda _: None)
    monkeypatch.setattr(ranges, "_WAITS", (0.0,) * 4)
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)
    with serving(hashes=True) as server:
        hub_at(server, tmp_path, monkeypatch)
        yield server
