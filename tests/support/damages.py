"""Damaged checkpoints: what is done to a good one, and what must be said about it.

A test file has a table of `Case`s and hands each to `assert_refused` and to `assert_told`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite, rewrite_config, tiny_config, write_checkpoint
from command_line import run_cli

from trtllm_ct.base.errors import CheckpointError, PayloadError
from trtllm_ct.convert.convert import convert_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ATTENTION = "model.layers.0.self_attn"
Q, DOWN = f"{ATTENTION}.q_proj", "model.layers.1.mlp.down_proj"

Damage = Callable[[Path], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A checkpoint of `options`, damaged, and what its one or first fault says: parts of the four fields."""

    damage: Damage
    error: type[CheckpointError]
    where: str
    expected: str
    found: str
    remedy: str
    options: dict[str, Any] = field(default_factory=dict)


def file(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Damage:
    """Change the bytes of a file."""
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


def header(change: Callable[[dict[str, Any]], object], name: str = WEIGHTS) -> Damage:
    """Change the header of a safetensors file, parsed; the payload stays."""

    def rewritten(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return file(rewritten, name)


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    """Change the weight map of the index."""

    def rewritten(content: bytes) -> bytes:
        document = json.loads(content)
        change(document["weight_map"])
        return json.dumps(document).encode()

    return file(rewritten, INDEX)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda directory: rewrite(directory, change)


def config(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda directory: rewrite_config(directory, change)


def block(**entries: object) -> Damage:
    """Change the quantization block."""
    return config(lambda document: document["quantization_config"].update(entries))


def weights_of_group(**arguments: object) -> Damage:
    return config(
        lambda document: document["quantization_config"]["config_groups"]["group_0"]["weights"].update(arguments)
    )


def element(name: str, value: float) -> Damage:
    """Overwrite the last element of a tensor."""

    def write(stored: dict[str, Tensor]) -> None:
        stored[name].view(-1)[-1] = value

    return tensors(write)


def in_order(*steps: Damage) -> Damage:
    return lambda directory: [step(directory) for step in steps]


def write_damaged(case: Case, directory: Path) -> Path:
    """The checkpoint of a case."""
    write_checkpoint(directory, **({"config": tiny_config(), "scheme": "int4-g32"} | case.options))
    case.damage(directory)
    return directory


def assert_says(case: Case, fault: Mapping[str, str]) -> None:
    assert case.where in fault["where"]
    assert case.expected in fault["expected"]
    assert case.found in fault["found"]
    assert case.remedy in fault["remedy"]
    assert len(fault["remedy"].split()) > 3


def assert_refused(case: Case, tmp_path: Path) -> None:
    """Refused by name, and neither OUT nor `.OUT.partial` is left; an OUT that was to be overwritten stays."""
    source, out = write_damaged(case, tmp_path / "source"), tmp_path / "out"
    with pytest.raises(case.error) as caught:
        convert_checkpoint(source, out)

    assert type(caught.value) is case.error
    assert_says(case, caught.value.faults[0].to_dict())
    assert sorted(tmp_path.iterdir()) == [source]

    out.mkdir()
    for name in ("config.json", "model.bin"):
        (out / name).write_text("old")
    with pytest.raises(case.error):
        convert_checkpoint(source, out, overwrite=True, force=True)

    assert sorted(tmp_path.iterdir()) == [out, source]
    assert {path.name: path.read_text() for path in out.iterdir()} == {"config.json": "old", "model.bin": "old"}


def assert_told(case: Case, tmp_path: Path) -> None:
    """The command line says the same and exits with 1: `convert` in words and as JSON, and `inspect` before it.

    Where it takes the payload to see the fault, `verify` sees it instead of `inspect`.
    """
    source = write_damaged(case, tmp_path / "source")
    convert = ("convert", source, tmp_path / "out", "--to", "modelopt")
    in_words, as_json = run_cli(*convert), run_cli(*convert, "--json")
    assert (in_words.code, in_words.out) == (1, "")
    assert case.found in in_words.err_words
    assert case.remedy in in_words.err_words
    assert (as_json.code, as_json.err) == (1, "")
    assert as_json.document.keys() == {"schema", "kind", "error", "faults", "warnings"}
    assert (as_json.document["kind"], as_json.document["error"]) == ("error", case.error.__name__)
    assert_says(case, as_json.document["faults"][0])

    earlier = run_cli("verify" if case.error is PayloadError else "inspect", source, "--json")
    assert earlier.code == 1
    assert_says(case, (earlier.document.get("problems") or earlier.document.get("faults"))[0])
