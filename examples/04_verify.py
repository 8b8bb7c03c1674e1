"""Prove that a converted directory holds the weights of its source.

python examples/04_verify.py [DIR [CONVERTED]]    without CONVERTED, DIR is converted first
"""

import sys
import tempfile
from pathlib import Path

import trtllm_ct
from trtllm_ct import convert_checkpoint, verify_checkpoint

directory = sys.argv[1] if len(sys.argv) > 1 else Path(trtllm_ct.__file__).parent / "cli" / "demo_data"

with tempfile.TemporaryDirectory() as work:
    converted = sys.argv[2] if len(sys.argv) > 2 else Path(work) / "converted"
    if len(sys.argv) <= 2:
        convert_checkpoint(directory, converted)
    report = verify_checkpoint(directory, converted)

for kind in ("native", "dequantized", "plain"):
    worst = report.worst(kind)
    if worst is not None:
        print(f"{kind}: worst error {worst.comparison.error:.3g} in {worst.name}, {worst.comparison.block}")
report.raise_if_bad()
print(f"{len(report.checks)} tensors are those of the source.")
