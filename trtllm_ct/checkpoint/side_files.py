"""What lies beside the weights and goes along unchanged: tokenizer, chat template, generation config, code, licence.

Everything is carried but what the target writes itself, weights in any format, and hidden files and caches: a
list of what to leave out ages better than one of what to take, as tokenizers keep inventing files.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CatalogError, FaultCollector
from trtllm_ct.checkpoint.catalog import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["carry_side_files", "side_files"]

_WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES, ".safetensors", ".index.json", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz",
)  # fmt: skip

# Top level only. The first three are the target's to write. params.json belongs to Mistral's own weight names, which
# are not carried, and some engines take its presence for their format.
_TARGET_FILES = {"config.json", "hf_quant_config.json", "quant_cfg.json", "params.json"}


def side_files(source: Path) -> tuple[str, ...]:
    """Everything in and below `source` but weights and configuration: relative names of files, sorted.

    Links are followed, as a hub cache consists of them. Raises `CatalogError` for those that lead nowhere or in a
    circle.
    """
    faults = FaultCollector()
    names = tuple(sorted(path.relative_to(source).as_posix() for path in _walk(source, (), faults)))
    faults.raise_if_any(CatalogError)
    return names


def carry_side_files(source: Path, out: Path) -> tuple[str, ...]:
    """Copy the side files of `source` to `out`; returns their names, see `side_files`.

    Sub-directories keep their place, and what arrives is files. Raises before anything is copied.
    """
    names = side_files(source)
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, out / name)
    return names


def _walk(folder: Path, above: tuple[Path, ...], faults: FaultCollector) -> Iterator[Path]:
    """The files to carry in and below `folder`; `above` are the folders that were walked through to get here."""
    way = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if _stays(path, at_top=not above):
            continue
        if path.is_dir() and not _encloses(path.resolve(), way):
            yield from _walk(path, way, faults)
        elif path.is_file():
            yield path
        else:
            found = f"a link to {path.readlink()}" if path.is_symlink() else "neither"
            remedy = "Fetch what the link stands for, or delete it when nothing needs it."
            faults.add(where=str(path), expected="a file or a directory", found=found, remedy=remedy)


def _stays(path: Path, *, at_top: bool) -> bool:
    """Whether something is left behind: hidden, a cache, weights, or for the target to write."""
    hidden = path.name.startswith(".") or path.name == "__pycache__"
    return hidden or path.name.endswith(_WEIGHT_SUFFIXES) or (at_top and path.name in _TARGET_FILES)


def _encloses(folder: Path, way: tuple[Path, ...]) -> bool:
    """Whether walking `folder` would lead back to a place on the way to it."""
    return any(folder == place or folder in place.parents for place in way)
