"""Files beside the weights that are copied unchanged: tokenizer, chat template, generation config, code, licence.

Everything is copied except files that the target writes itself, weights in any format, hidden files and caches. A list
of exclusions ages better than a list of inclusions, because tokenizers keep adding new files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CatalogError, FaultCollector
from trtllm_ct.checkpoint.catalog import PICKLE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trtllm_ct.checkpoint.folder import Folder

__all__ = ["copy_side_files", "side_bytes", "side_files"]

_WEIGHT_SUFFIXES = (
    *PICKLE_SUFFIXES, ".safetensors", ".index.json", ".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz",
)  # fmt: skip

# Excluded at the top level only. The target writes the first three itself. params.json belongs to Mistral's own weight
# names, which are not copied, and some engines detect their format by its presence.
_TARGET_FILES = {"config.json", "hf_quant_config.json", "quant_cfg.json", "params.json"}


def side_files(source: Path) -> tuple[str, ...]:
    """Return the relative names of all files in and below `source` except weights and configuration, sorted.

    Links are followed, because a hub cache consists of links. Raises `CatalogError` for links that lead nowhere or in a
    circle.
    """
    faults = FaultCollector()
    names = tuple(sorted(path.relative_to(source).as_posix() for path in _walk(source, (), faults)))
    faults.raise_if_any(CatalogError)
    return names


def copy_side_files(source: Path, out: Folder) -> tuple[str, ...]:
    """Copy the side files of `source` to `out` and return their names; see `side_files`.

    Sub-directories are kept, and links are copied as files. Raises `CatalogError` before anything is copied.
    """
    names = side_files(source)
    for name in names:
        with (source / name).open("rb", buffering=0) as stream:
            out.copy(name, stream.fileno())
    return names


def side_bytes(source: Path) -> int:
    """Return the size of all side files in bytes."""
    return sum((source / name).stat().st_size for name in side_files(source))


def _walk(folder: Path, above: tuple[Path, ...], faults: FaultCollector) -> Iterator[Path]:
    """Yield the files to copy in and below `folder`; `above` are the resolved folders on the path down to it."""
    path_down = (*above, folder.resolve())
    for path in sorted(folder.iterdir()):
        if _is_excluded(path, at_top=not above):
            continue
        if path.is_dir() and not _leads_back(path.resolve(), path_down):
            yield from _walk(path, path_down, faults)
        elif path.is_file():
            yield path
        else:
            found = f"a link to {path.readlink()}" if path.is_symlink() else "neither"
            remedy = "Fetch what the link stands for, or delete it when nothing needs it."
            faults.add(where=str(path), expected="a file or a directory", found=found, remedy=remedy)


def _is_excluded(path: Path, *, at_top: bool) -> bool:
    """Whether an entry is not copied: hidden, a cache, weights, or a file that the target writes itself."""
    hidden = path.name.startswith(".") or path.name == "__pycache__"
    return hidden or path.name.endswith(_WEIGHT_SUFFIXES) or (at_top and path.name in _TARGET_FILES)


def _leads_back(folder: Path, path_down: tuple[Path, ...]) -> bool:
    """Whether `folder` is, or contains, one of the folders on the path down to it, so that a walk would not end."""
    return any(folder == ancestor or folder in ancestor.parents for ancestor in path_down)
