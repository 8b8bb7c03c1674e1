"""Ends conversions at every one of their file-system calls, and looks at what is left.

Run as a program in a process of its own: it imports the package once and forks a child for each conversion. `report`
prints one JSON document: how many calls a conversion makes, how many endings were tried, and what was wrong with them.

An ending is a call that fails with an errno, or a call before which, or after which, the process is killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KILLS = ("kill before", "kill after")
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EINTR")
ENDINGS = (*KILLS, *ERRORS)
SCENES = ("fresh", "overwrite", "two steps", "resume")

OUT = "out"
REPLACED = ".out.replaced-by-trtllm-ct"
BYSTANDERS = {"thesis.tex": "years", ".out.replaced/thesis.tex": "years too"}
"""Files of the user beside the output, one in a folder with a name that is similar to ours."""

Tree = dict[str, str]
"""The hashes of files by their relative names."""


def tree(folder: Path) -> Tree:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


class Calls:
    """Stands before every function of `file_calls`: counts them, ends the n-th one, or tells `after` about each."""

    def __init__(
        self, ending: str = "", at: int = 0, after: Callable[[str, tuple[Any, ...]], None] | None = None
    ) -> None:
        self.ending, self.at, self.after = ending, at, after
        self.count = 0
        self._lock = Lock()

    def install(self) -> None:
        from trtllm_ct.checkpoint import file_calls

        for name in file_calls.__all__:
            setattr(file_calls, name, partial(self._call, name, getattr(file_calls, name)))

    def begin(self, ending: str, at: int) -> None:
        """Count from 0 again, towards another ending."""
        self.ending, self.at, self.count = ending, at, 0

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            self.count += 1
            ends = self.count == self.at
        if ends and self.ending == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        if ends and self.ending in ERRORS:
            if name == "close":
                function(*arguments)
            code = getattr(errno, self.ending)
            raise OSError(code, os.strerror(code))
        result = function(*arguments)
        if ends and self.ending == "kill after":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.after is not None:
            with self._lock:
                self.after(name, arguments)
        return result


class Disk:
    """What would be left of a folder after a power cut: only what was synced.

    A file has the content that it had when it was last synced; a directory has the names that it had then.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.contents: dict[int, str] = {}
        self.names: dict[int, dict[str, int]] = {}
        for path in (root, *root.rglob("*")):
            self._keep(path, path.stat().st_ino)

    def sync(self, descriptor: int) -> None:
        self._keep(Path(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_ino)

    def _keep(self, path: Path, inode: int) -> None:
        if path.is_dir():
            self.contents.pop(inode, None)  # The number may have been that of a file which is gone.
            self.names[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.names.pop(inode, None)
            self.contents[inode] = hashlib.sha256(path.read_bytes()).hexdigest()

    def synced(self, name: str) -> Tree | None:
        """The folder `name` after a power cut that loses all that was not synced; None if there is no such folder."""
        inode = self.names[self.root.stat().st_ino].get(name)
        return None if inode is None else dict(self._below(inode, ""))

    def _below(self, inode: int, prefix: str) -> Iterator[tuple[str, str]]:
        for name, inner in self.names.get(inode, {}).items():
            if inner in self.names:
                yield from self._below(inner, f"{prefix}{name}/")
            else:
                yield prefix + name, self.contents.get(inner, "never synced")

    def named(self, name: str) -> Tree | None:
        """The folder `name` after a power cut that keeps all names, but only the bytes that were synced."""
        folder = self.root / name
        if not folder.is_dir():
            return None
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {
            path.relative_to(folder).as_posix(): self.contents.get(path.stat().st_ino, "never synced") for path in files
        }


@dataclass
class Scene:
    """A source, and a folder with what is there before the conversion; `old` is the output that it replaces."""

    name: str
    source: Path
    template: Path
    new: Tree
    old: Tree | None

    @property
    def overwrites(self) -> bool:
        return self.old is not None

    def convert(self, folder: Path) -> None:
        from trtllm_ct.checkpoint import file_calls
        from trtllm_ct.convert.convert import convert_checkpoint

        if self.name == "two steps":
            file_calls.exchange = lambda *_: False
        convert_checkpoint(self.source, folder / OUT, overwrite=self.overwrites, max_shard_bytes=20_000, workers=2)

    def complaints(self, folder: Path, out: Tree | None, replaced: Tree | None) -> Iterator[str]:
        """Say what is wrong with a folder after a conversion was ended."""
        whole = out in (self.new, self.old) or (self.name == "two steps" and out is None and replaced == self.old)
        if not whole:
            yield "no whole output" if out is None else f"a damaged output: {sorted(out)}"
        if {name: (folder / name).read_text() for name in BYSTANDERS} != BYSTANDERS:
            yield "another file was changed"


@contextmanager
def copied(template: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=template.parent) as name:
        shutil.copytree(template, Path(name) / "run", copy_function=shutil.copy2)
        yield Path(name) / "run"


def forked(run: Callable[[], object]) -> int:
    """The wait status of a child that runs `run`: exit code 0, 1 after a typed error, 99 after any other."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            from trtllm_ct.base.errors import TrtllmCtError

            try:
                run()
            except TrtllmCtError:
                code = 1
        except BaseException:  # noqa: BLE001 (the child ends with any)
            traceback.print_exc()
            code = 99
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1]


def looked_at(folder: Path, name: str) -> Tree | None:
    return tree(folder / name) if (folder / name).is_dir() else None


def tried(scene: Scene, ending: str, at: int) -> list[str]:
    """What is wrong after a conversion was ended at a call, and after the same command ran again."""
    with copied(scene.template) as folder:

        def run() -> None:
            Calls(ending, at).install()
            scene.convert(folder)

        status = forked(run)
        wrong = [*scene.complaints(folder, looked_at(folder, OUT), looked_at(folder, REPLACED))]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 99:
            wrong.append("an error of another type")
        finished = not scene.overwrites and looked_at(folder, OUT) == scene.new
        again = forked(lambda: scene.convert(folder))
        if again != 0 and not finished:
            wrong.append(f"the same command ends with {again}")
        wrong += scene.complaints(folder, looked_at(folder, OUT), None)
        if looked_at(folder, OUT) != scene.new:
            wrong.append("the same command gives another output")
        if again == 0:
            wrong += what_is_left_behind(folder)
    return [f"{scene.name}, {ending} {at}: {complaint}" for complaint in wrong]


def what_is_left_behind(folder: Path) -> list[str]:
    """Say what is in a folder beside the output and what was there before the conversion."""
    left = sorted(path.name for path in folder.iterdir())
    return [] if left == sorted({OUT, *(name.partition("/")[0] for name in BYSTANDERS)}) else [f"left behind: {left}"]


def small_units() -> None:
    """Let a conversion make all its calls: a unit for each module, and each line of the journal written at once."""
    from trtllm_ct.checkpoint import file_calls
    from trtllm_ct.convert import journal, units

    units.UNIT_BYTES = 1
    journal._SECONDS_IN_MEMORY = 0
    file_calls.sync = lambda _descriptor: None  # No power cut is real here, and the wait for the disk would be long.


def power_cuts(scene: Scene) -> tuple[int, list[str]]:
    """The calls of one conversion, and what a power cut after each of them would spoil."""
    with copied(scene.template) as folder:
        result = folder.parent / "power"

        def run() -> None:
            disk, wrong = Disk(folder), []

            def after(name: str, arguments: tuple[Any, ...]) -> None:
                if name == "sync":
                    disk.sync(arguments[0])
                for view in (disk.synced, disk.named):
                    found = scene.complaints(folder, view(OUT), view(REPLACED))
                    wrong.extend(f"{scene.name}, power cut after {calls.count} ({name}): {text}" for text in found)

            calls = Calls(after=after)
            calls.install()
            scene.convert(folder)
            if disk.synced(OUT) != scene.new:
                wrong.append(f"{scene.name}: the output would not survive the end of the conversion")
            result.write_text(json.dumps([calls.count, wrong]))

        status = forked(run)
        return tuple(json.loads(result.read_text())) if result.exists() else (0, [f"{scene.name}: ended with {status}"])


def scenes(work: Path, names: tuple[str, ...]) -> Iterator[Scene]:
    from builders import tiny_config, write_checkpoint

    from trtllm_ct.convert.convert import convert_checkpoint

    small_units()
    config = tiny_config(layers=1, hidden=32, intermediate=64, vocabulary=32)
    base, source = work / "base", work / "source"
    for name, scheme in (("source", "int8-channel"), ("older", "int4-g32")):
        write_checkpoint(work / name, config=config, scheme=scheme, shards=2, tokenizer=True)
        (work / name / "additional_chat_templates").mkdir()
        (work / name / "additional_chat_templates/tools.jinja").write_text("tools")
    for name, content in BYSTANDERS.items():
        (base / name).parent.mkdir(exist_ok=True, parents=True)
        (base / name).write_text(content)
    convert_checkpoint(source, work / "new", max_shard_bytes=20_000)
    convert_checkpoint(work / "older", work / "old")
    new, old = tree(work / "new"), tree(work / "old")
    for name in names:
        template = work / name.replace(" ", "-")
        shutil.copytree(base, template)
        overwrites = name in {"overwrite", "two steps"}
        if overwrites:
            shutil.copytree(work / "old", template / OUT)
        scene = Scene(name, source, template, new, old if overwrites else None)
        if name == "resume":
            count = power_cuts(scene)[0]
            forked(partial(_cut, scene, template, count // 2))
        yield scene


def _cut(scene: Scene, folder: Path, at: int) -> None:
    Calls("kill before", at).install()
    scene.convert(folder)


def report(step: int, first: int = 0, names: tuple[str, ...] = SCENES, endings: tuple[str, ...] = ENDINGS) -> None:
    """Try every `step`-th call of each scene, with all endings in turn, and print what was wrong."""
    calls, cuts, count, wrong = {}, 0, 0, []
    with tempfile.TemporaryDirectory() as work:
        for scene in scenes(Path(work), names):
            calls[scene.name], spoiled = power_cuts(scene)
            cuts += 2 * calls[scene.name]
            wrong += spoiled
            numbered = [(at, ending) for at in range(1, calls[scene.name] + 1) for ending in endings]
            for at, ending in numbered[first::step]:
                wrong += tried(scene, ending, at)
                count += 1
    print(json.dumps({"calls": calls, "power cuts": cuts, "endings": count, "wrong": wrong}, indent=1))


if __name__ == "__main__":
    report(*(int(argument) for argument in sys.argv[1:3]))
