"""Read and write the file of a calibration: the static scale of each module's input, in safetensors.

A file has one tensor `MODULE.input_scale` for each module: float32 (float16 and bfloat16 are read too) with one
element, which is the largest magnitude of the module's input over 448. ModelOpt's exports and compressed-tensors call
the scales of FP8 inputs by this name, so that their weight files are calibrations too: other tensors are ignored. In
NVFP4, ModelOpt's exports call another number so (`modelopt/torch/quantization/qtensor/nvfp4_tensor.py:
NVFP4QTensor.get_activation_scaling_factor`).
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.arguments import path_of
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError, Fault, FaultCollector, PayloadError, UsageError
from trtllm_ct.base.whole_files import write_whole
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.header import read_header
from trtllm_ct.checkpoint.output_place import check_file_place
from trtllm_ct.checkpoint.reader import Run
from trtllm_ct.checkpoint.runs import read_runs
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.engine.calibration import INPUT_SCALE, Calibration, is_scale
from trtllm_ct.engine.requantization import Requantize
from trtllm_ct.layouts.raw_bytes import read_scalar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from trtllm_ct.checkpoint.header import StoredTensor

__all__ = [
    "asked_requantization",
    "check_calibration_place",
    "read_calibration",
    "with_own_scales",
    "write_calibration",
]

_DTYPES = frozenset({DType.F32, DType.F16, DType.BF16})
_SUFFIX = f".{INPUT_SCALE}"
_REMEDY = "Measure the scales with `trtllm-ct calibrate DIR OUT --text FILE`, or correct the program that wrote them."


def asked_requantization(
    words: str | Iterable[str] | Mapping[str, str] | None, calibration: str | Path | None = None
) -> Requantize:
    """Return what words such as `experts=w4a8-awq` ask for, with the scales in the file `calibration`.

    Raises `UsageError` for other words, for a file that nothing of this reads, and for one that can't be opened, and
    what `read_calibration` raises.
    """
    asked = Requantize.parse(words)
    if calibration is None:
        return asked
    if not asked.reads_calibration:
        raise UsageError(
            Fault(
                where="--calibration",
                expected="a form that reads scales of inputs, such as --requantize experts=w4a8-awq",
                found="no such form" if asked.words else "no --requantize",
                remedy="Leave --calibration out, or ask for such a form.",
            )
        )
    return replace(asked, calibration=read_calibration(calibration))


def read_calibration(path: str | Path) -> Calibration:
    """Read the scales in a safetensors file.

    Raises `UsageError` if there is no such file, `CatalogError` for a damaged one, and `PayloadError` with all faults
    of its scales: another dtype, several elements, numbers that are not positive or beyond all that inputs have, and
    those of an export in NVFP4, which are the largest magnitude over 6 x 448.
    """
    path = path_of("calibration", path)
    try:
        tensors = read_header(path, path.name).tensors
    except OSError as error:
        expected, found = "a safetensors file with the scales of inputs", f"{error.strerror or error}".lower()
        raise UsageError(Fault(where=str(path), expected=expected, found=found, remedy=_REMEDY)) from None
    if not any(name.endswith(_SUFFIX) for name in tensors):
        expected = f"tensors called MODULE.{INPUT_SCALE}"
        raise CatalogError(Fault(where=str(path), expected=expected, found="none", remedy=_REMEDY))
    _refuse_nvfp4(tensors)
    catalog = Catalog(source=Folder(path.parent), tensors=tensors, files=(path.name,))
    return Calibration(scales=_read_scales(catalog, tensors.values()), place=str(path))


def with_own_scales(asked: Requantize, catalog: Catalog) -> Requantize:
    """Return what was asked for, with the scales that the checkpoint stores for modules that the file leaves out.

    Raises `PayloadError` as `read_calibration` does. Nothing is read if no form needs it.
    """
    if not asked.reads_calibration:
        return asked
    given = asked.calibration.scales
    own = [tensor for name, tensor in catalog.tensors.items() if name.removesuffix(_SUFFIX) not in given]
    return replace(asked, calibration=replace(asked.calibration, stored=_read_scales(catalog, own)))


def check_calibration_place(path: Path, source: Path) -> None:
    """Raise `UsageError` if a file can't be written at a path, or is there already: before the model of `source` runs.

    A new file inside of the source would be one of its weight files.
    """
    if path.parent.is_dir() and not os.path.lexists(path):
        check_file_place(path, [source], where=str(path))
        return
    raise UsageError(
        Fault(
            where=str(path),
            expected="a new file in a folder that exists",
            found="something of this name" if path.parent.is_dir() else f"no folder {path.parent}",
            remedy="Name another file, such as scales.safetensors.",
        )
    )


def write_calibration(path: str | Path, scales: Mapping[str, float]) -> None:
    """Write scales to a safetensors file; an older file stays until the new one is complete.

    Raises `OutputError` if that fails.
    """
    path = path_of("path", path)
    header = {
        f"{name}{_SUFFIX}": {"dtype": "F32", "shape": [], "data_offsets": [4 * position, 4 * position + 4]}
        for position, name in enumerate(scales)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + struct.pack(f"<{len(scales)}f", *scales.values())
    write_whole(path, content, remedy="Name a file in another folder.")


def _read_scales(catalog: Catalog, tensors: Iterable[StoredTensor]) -> dict[str, float]:
    """Return the scales among some tensors by module; raises `PayloadError` with all faults."""
    faults, scales = FaultCollector(), {}
    runs = []
    for tensor in tensors:
        if not tensor.name.endswith(_SUFFIX):
            continue
        if tensor.spec.numel == 1 and tensor.spec.dtype in _DTYPES:
            runs.append(Run(tensor.name))
        else:
            _refuse(tensor.name, "one number: float32, float16 or bfloat16", str(tensor.spec), faults)
    for run, data in read_runs(catalog, runs):
        scale = read_scalar(data, catalog.tensors[run.name].spec.dtype)
        if not is_scale(scale):
            _refuse(run.name, "a positive number from 2^-100 to 2^100", f"{scale:g}", faults)
        scales[run.name.removesuffix(_SUFFIX)] = scale
    faults.raise_if_any(PayloadError)
    return scales


def _refuse_nvfp4(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise `PayloadError` for scales beside a weight in NVFP4: by the same name, ModelOpt means another number."""
    faults = FaultCollector()
    for name in tensors:
        module = name.removesuffix(_SUFFIX)
        stored = [tensors.get(f"{module}.{local}") for local in ("weight", "weight_scale")]
        if name.endswith(_SUFFIX) and [tensor and tensor.spec.dtype for tensor in stored] == [DType.U8, DType.F8_E4M3]:
            _refuse(name, "the scale of an FP8 input", "one beside a weight in NVFP4, mostly a sixth of it", faults)
    faults.raise_if_any(PayloadError)


def _refuse(name: str, expected: str, found: str, faults: FaultCollector) -> None:
    faults.add(where=name, expected=expected, found=found, remedy=_REMEDY)
