"""A console of rich that shows no control characters of strangers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.segment import Segment

from trtllm_ct.base.texts import printable
from trtllm_ct.cli.streams import drop_output, writing

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["SafeConsole"]


class SafeConsole(Console):
    """A console that escapes control characters, which names in a checkpoint may hold, except line breaks."""

    def print(self, *arguments: Any, **keywords: Any) -> None:
        """Print to the stream; raises `OutputError` where it can't be written."""
        with writing():
            super().print(*arguments, **keywords)

    def on_broken_pipe(self) -> None:
        """Drop the rest of the output; rich would end the process with an error."""
        drop_output()

    def render(self, *arguments: Any, **keywords: Any) -> Iterable[Segment]:
        """Yield the segments of a renderable, without control characters in their text."""
        for segment in super().render(*arguments, **keywords):
            if segment.control or segment.text.isprintable() or segment.text == "\n":
                yield segment
            else:
                text = "\n".join(map(printable, segment.text.split("\n")))
                yield Segment(text, segment.style)
