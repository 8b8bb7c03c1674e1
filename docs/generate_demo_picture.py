"""Draw docs/demo.png: what `trtllm-ct demo` prints, as a terminal shows it, in a headless Chromium.

python docs/generate_demo_picture.py
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.terminal_theme import MONOKAI

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from browser import Browser, find_browser  # noqa: E402

from trtllm_ct.cli.demo import run_demo  # noqa: E402

PICTURE = ROOT / "docs" / "demo.png"
COLUMNS = 120
LARGEST = 300_000
"""The most bytes of the picture."""

PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: {background}; color: {foreground} }}
pre {{ margin: 16px; font: 16px/20px monospace }}
</style><pre>$ trtllm-ct demo
{code}</pre>"""


def main() -> None:
    """Draw the picture."""
    if find_browser() is None:
        sys.exit("Install Chromium first.")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    run_demo(console)
    page = console.export_html(theme=MONOKAI, inline_styles=True, code_format=PAGE)
    page = re.sub(r"/\S*/(demo_data|demo-modelopt)", r"\1", page)
    with TemporaryDirectory() as folder, Browser(Path(folder) / "profile") as browser:
        file = Path(folder) / "demo.html"
        file.write_text(page, encoding="utf-8")
        browser.open(file, height=20 * page.count("\n"))
        browser.screenshot(PICTURE)
    assert PICTURE.stat().st_size < LARGEST  # noqa: S101


if __name__ == "__main__":
    main()
