"""The cases of the benchmark: what is timed, against which peers, on which checkpoints.

A case creates the job of each side, this package and its peers, for one checkpoint. The packages that a peer needs are
searched for but not imported here. A peer that is not installed is left out and reported.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from itertools import cycle
from types import MappingProxyType
from typing import TYPE_CHECKING

from benchmarks.measure import Job
from benchmarks.results import Clock
from trtllm_ct.base.str_enum import StrEnum

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = [
    "CASES",
    "DIRECTORY",
    "KERNEL_ROWS",
    "KERNEL_SHAPE",
    "NO_SHAPE",
    "PEERS",
    "RANKS",
    "SWEEPS",
    "Case",
    "Peer",
    "Place",
    "Sweep",
    "Table",
    "convert_job",
    "kernels_job",
    "table_of",
]

DIRECTORY = "DIR"
"""The shape name of a checkpoint that the user gave."""

NO_SHAPE = ""
"""The shape name of cases that need no checkpoint."""

RANKS = 4
"""The tensor-parallel size in the cases that load slices for ranks."""

KERNEL_SHAPE = (4096, 14336)
"""The shape [N, K] of the weight that kernels are timed on."""


class Table(StrEnum):
    """The tables of docs/performance.md, each with a plot."""

    KERNELS = "kernels"
    LOAD = "load"
    CONVERT = "convert"
    HEADERS = "headers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a case runs: a checkpoint, its size, and a folder for output.

    `tensors` and `stored_bytes` are the size of the checkpoint `source`. `bytes_of` maps a target to the payload bytes
    that the checkpoint has when it is delivered to this target. Outputs are written in `work`.
    """

    source: Path
    work: Path
    tensors: int
    stored_bytes: int
    bytes_of: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is timed: the job of this package (`ours`), and the jobs of the peers by name.

    `moves` names the target whose delivered bytes are used to compute throughput; it is empty if no throughput is
    computed. A case with `once` runs only once, because its result is not a time.
    """

    name: str
    title: str
    table: Table
    clock: Clock
    shapes: frozenset[str]
    ours: Callable[[Place], Job]
    peers: Mapping[str, Callable[[Place], Job]]
    moves: str = ""
    once: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A case measured at four sizes of one shape, for a plot; `peers` are the peers that the plot shows."""

    case: str
    shape: str
    layers: tuple[int, ...]
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A program that this package is compared with.

    `needs` are the Python packages that it needs, and `program` is an executable that must be on the path.
    """

    name: str
    needs: tuple[str, ...] = ()
    program: str = ""

    @property
    def missing(self) -> str:
        """The requirements that are not installed, as text; empty if all are."""
        absent = [package for package in self.needs if importlib.util.find_spec(package) is None]
        if self.program and shutil.which(self.program) is None:
            absent.append(self.program)
        return " and ".join(absent)


PEERS: Mapping[str, Peer] = MappingProxyType(
    {
        peer.name: peer
        for peer in (
            Peer(name="cp", program="cp"),
            Peer(name="convert"),
            Peer(name="load_file", needs=("safetensors",)),
            Peer(name="library", needs=("compressed_tensors", "safetensors", "transformers")),
            Peer(name="transformers", needs=("transformers", "compressed_tensors")),
        )
    }
)
"""The peers that `--against` accepts. memcpy, the peer of the kernels, is always available."""


def _python(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, *(str(argument) for argument in arguments))


def _task(name: str, *arguments: str) -> Callable[[Place], Job]:
    """Return a function that creates the job of a task of `tasks.py` on a checkpoint."""

    def make(place: Place) -> Job:
        return Job(commands=(_python("-m", "benchmarks.tasks", name, place.source, *arguments),))

    return make


def convert_job(to: str) -> Callable[[Place], Job]:
    """Return a function that creates the job of the command `trtllm-ct convert --to TO`."""

    def make(place: Place) -> Job:
        out = place.work / "out"
        command = _python("-m", "trtllm_ct", "convert", place.source, out, "--to", to, "--no-sync", "--json")
        return Job(commands=(command,), output=out)

    return make


def _verify(place: Place) -> Job:
    """Return the job of the command `trtllm-ct verify DIR OUT`; the conversion before it is not timed."""
    converted = convert_job("modelopt")(place)
    command = _python("-m", "trtllm_ct", "verify", place.source, place.work / "out", "--json")
    return Job(commands=(command,), before=converted.commands[0], output=converted.output)


def kernels_job(rows: int, columns: int, samples: int) -> Job:
    """Return the job that times all kernels and memcpy for a weight of this shape."""
    return Job(commands=(_python("-m", "benchmarks.tasks", "kernels", rows, columns, samples),))


def _library_convert(place: Place) -> Job:
    out = place.work / "out"
    return Job(
        commands=(_python("-m", "benchmarks.tasks", "library-convert", place.source, out),),
        output=out,
        environment={"TQDM_DISABLE": "1"},
    )


def _copy(place: Place) -> Job:
    out = place.work / "out"
    return Job(commands=(("cp", "-r", str(place.source), str(out)),), output=out)


def _copy_output_bytes(place: Place) -> Job:
    """Return the job that copies as many bytes with `cp` as the plain weights have.

    It copies the files of the source, repeatedly, and the last file in part. The source is used because it is in the
    page cache, which a directory of plain weights would not be.
    """
    out, remaining = place.work / "out", place.bytes_of["dense"]
    commands: list[tuple[str, ...]] = [("mkdir", str(out))]
    for number, file in enumerate(cycle(sorted(place.source.glob("*.safetensors")))):
        size = file.stat().st_size
        if remaining <= size:
            part = ("dd", f"if={file}", f"of={out / str(number)}", "bs=1M", f"count={remaining}B", "status=none")
            return Job(commands=(*commands, part), output=out)
        commands.append(("cp", str(file), str(out / str(number))))
        remaining -= size
    raise AssertionError("a checkpoint has weight files")


def _import(_place: Place) -> Job:
    code = (
        "import json, time; started = time.perf_counter(); import trtllm_ct; "
        "print(json.dumps({'seconds': time.perf_counter() - started}))"
    )
    return Job(commands=(_python("-c", code),))


_EVERYWHERE = frozenset({"1b", "8b", "tiny", DIRECTORY})
_IN_MEMORY = frozenset({"1b", "tiny", DIRECTORY})
_COPIED = frozenset({"1b-fp8", "8b-fp8", "1b-nvfp4", "8b-nvfp4"})
"""Checkpoints whose codes are delivered as they are stored."""

CASES = (
    Case(
        name="load-native",
        title="`load_weights`, native",
        table=Table.LOAD,
        clock=Clock.CALL,
        shapes=_IN_MEMORY,
        ours=_task("load-weights", "native"),
        peers={"load_file": _task("load-file")},
        moves="modelopt",
    ),
    Case(
        name="load-dense",
        title="`load_weights`, dense",
        table=Table.LOAD,
        clock=Clock.CALL,
        shapes=_IN_MEMORY,
        ours=_task("load-weights", "dense"),
        peers={"library": _task("library-load"), "transformers": _task("transformers-load")},
        moves="dense",
    ),
    Case(
        name="rank",
        title=f"`load_weights`, rank 0 of tp {RANKS}",
        table=Table.LOAD,
        clock=Clock.CALL,
        shapes=_IN_MEMORY,
        ours=_task("rank-bytes", str(RANKS)),
        peers={},
        once=True,
    ),
    Case(
        name="node",
        title=f"`load_weights`, all ranks of tp {RANKS} on one node, nothing in the page cache",
        table=Table.LOAD,
        clock=Clock.CALL,
        shapes=_IN_MEMORY,
        ours=_task("node-bytes", str(RANKS)),
        peers={},
        once=True,
    ),
    Case(
        name="convert-modelopt",
        title="`convert --to modelopt`",
        table=Table.CONVERT,
        clock=Clock.PROCESS,
        shapes=_EVERYWHERE | _COPIED,
        ours=convert_job("modelopt"),
        peers={"cp": _copy},
        moves="modelopt",
    ),
    Case(
        name="convert-dense",
        title="`convert --to dense`",
        table=Table.CONVERT,
        clock=Clock.PROCESS,
        shapes=_EVERYWHERE,
        ours=convert_job("dense"),
        peers={"cp": _copy_output_bytes, "library": _library_convert},
        moves="dense",
    ),
    Case(
        name="verify",
        title="`verify` of a directory for `modelopt`",
        table=Table.CONVERT,
        clock=Clock.PROCESS,
        shapes=_EVERYWHERE,
        ours=_verify,
        peers={"convert": convert_job("modelopt")},
    ),
    Case(
        name="inspect",
        title="`inspect`",
        table=Table.HEADERS,
        clock=Clock.PROCESS,
        shapes=_EVERYWHERE | {"kimi-k2"},
        ours=_task("inspect"),
        peers={},
    ),
    Case(
        name="import",
        title="`import trtllm_ct`",
        table=Table.HEADERS,
        clock=Clock.PROCESS,
        shapes=frozenset({NO_SHAPE}),
        ours=_import,
        peers={},
    ),
)
"""The cases that are timed in separate processes; the kernels (`kernels.py: KERNELS`) share one process."""

SWEEPS = (
    Sweep(case="load-native", shape="1b", layers=(4, 8, 16, 32), peers=("load_file",)),
    Sweep(case="convert-modelopt", shape="1b", layers=(4, 8, 16, 32), peers=("cp",)),
    Sweep(case="convert-dense", shape="1b", layers=(4, 8, 16, 32), peers=("cp",)),
    Sweep(case="inspect", shape="kimi-k2", layers=(8, 16, 32, 61), peers=()),
)
"""The measurements of time against size, for the plots."""

KERNEL_ROWS = (1024, 2048, 4096, 8192)
"""Rows of the weights that kernels are plotted for; they have as many columns as `KERNEL_SHAPE`."""


def table_of(case: str) -> Table:
    """Return the table that a case or a kernel belongs to, given its name."""
    return next((candidate.table for candidate in CASES if candidate.name == case), Table.KERNELS)
