"""A headless Chromium, driven by its debugging protocol over a pipe: pages from files, and no network.

`find_browser` returns the program, None without one. `Browser.open` loads a page and notes every message of its
console, every exception, and every request that it makes.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

__all__ = ["Browser", "find_browser"]

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update"),
    *(
        "--disable-sync",
        "--disable-default-apps",
        "--mute-audio",
        "--remote-debugging-pipe",
        "--font-render-hinting=none",
    ),
)
_ARROWS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9}


def find_browser() -> str | None:
    """The first of the usual names of Chromium that is installed."""
    return next((found for name in _PROGRAMS if (found := shutil.which(name))), None)


@dataclass(slots=True)
class Browser:
    """One page of a running browser; use it in a `with` statement."""

    profile: Path
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _process: int = 0
    _to: int = -1
    _from: int = -1
    _rest: bytes = b""
    _count: int = 0
    _session: str = ""
    _seen: set[str] = field(default_factory=set)

    def __enter__(self) -> Self:
        program = find_browser()
        assert program is not None
        read_end, self._to = os.pipe()
        self._from, write_end = os.pipe()
        # Above the two numbers that the browser expects its ends of the pipes at.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read_end, write_end)]
        null = os.open(os.devnull, os.O_RDWR)
        places = [(null, 1), (null, 2), (ends[0], 3), (ends[1], 4)]
        self._process = os.posix_spawn(
            program,
            [program, *_FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, end, place) for end, place in places],
        )
        for end in (read_end, write_end, *ends, null):
            os.close(end)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        session, self._session = self._session, ""
        if session:
            self.call("Browser.close")
        os.close(self._to)
        os.close(self._from)
        os.waitpid(self._process, 0)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self._note(answer)

    def open(self, page: Path, *, width: int = 1280, height: int = 900, scheme: str = "light", media: str = "") -> None:
        """Load a page in a window of this size, with a colour scheme, for a medium such as `print`."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.messages.clear()
        self.requests.clear()
        self._seen.clear()
        self.call("Page.navigate", url=page.as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._note(self._next())

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            code = _ARROWS[key]
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def point(self, x: float, y: float) -> None:
        """Move the pointer to a place in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a picture of the window, or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        """Return the page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._from, 1 << 20)
            assert data, "the browser ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        method, values = event.get("method", ""), event.get("params", {})
        self._seen.add(method)
        if method == "Runtime.consoleAPICalled":
            self.messages.append(str(values["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(values["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(values["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
