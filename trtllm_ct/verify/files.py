"""The weight files of a converted directory, as engines read them: all files, whatever the index says.

Source: TensorRT-LLM `_torch/models/checkpoints/hf/weight_loader.py: HfWeightLoader.load_weights`, which reads each
`*.safetensors` at the top of the directory, and lets a later file replace the tensors of an earlier one.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from trtllm_ct.checkpoint.header import format_names, read_header

if TYPE_CHECKING:
    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.checkpoint.catalog import Catalog

__all__ = ["check_files"]


def check_files(catalog: Catalog, faults: FaultCollector) -> None:
    """Add a fault for each weight file that only some readers read, and for tensors that are in several files.

    `catalog` has the tensors of the converted directory, from the files that its index names.
    """
    directory = catalog.directory
    read = {path.name for path in directory.glob("*.safetensors") if not path.name.startswith(".")}
    for name in sorted(read - set(catalog.files)):
        faults.add(
            where=f"{directory / name}",
            expected="only files that the index names, since engines read all of them",
            found="a weight file that no index names",
            remedy="Delete it, or convert again into an empty directory.",
        )
    for name in sorted(set(catalog.files) - read):
        faults.add(
            where=f"{directory / name}",
            expected="a file at the top of the directory, where engines look for it",
            found="a file in a folder",
            remedy="Convert again into an empty directory.",
        )
    copies = Counter(name for file in catalog.files for name in read_header(directory / file, file).tensors)
    if several := sorted(name for name, count in copies.items() if count > 1):
        faults.add(
            where=str(directory),
            expected="each tensor in one file, since engines don't read the index",
            found=f"in several files: {format_names(several)}",
            remedy="Convert again into an empty directory.",
        )
