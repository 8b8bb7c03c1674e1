"""Prepared directories whose files a test changes: as if they had been prepared so."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

RECORD = "trtllm_ct.json"


def record_contents(directory: Path) -> None:
    """Write the hashes of the files anew, which the record has beside them."""
    record = json.loads((directory / RECORD).read_text())
    for name, content in record["contents"].items():
        if not content.startswith("link ") and (directory / name).is_file():
            record["contents"][name] = sha256((directory / name).read_bytes()).hexdigest()
    (directory / RECORD).write_text(json.dumps(record))
