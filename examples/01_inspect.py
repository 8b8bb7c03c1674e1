"""Show what a checkpoint is and how it would be delivered to TensorRT-LLM; reads headers only, without torch.

python examples/01_inspect.py [DIR]    DIR is a compressed-tensors directory; by default the bundled checkpoint
"""

import sys
from pathlib import Path

import trtllm_ct
from trtllm_ct import inspect_checkpoint

directory = sys.argv[1] if len(sys.argv) > 1 else Path(trtllm_ct.__file__).parent / "cli" / "demo_data"

inspection = inspect_checkpoint(directory, to="modelopt")

print(inspection.detection.description)
for evidence in inspection.detection.evidence:
    print("  evidence:", evidence)
for row in inspection.rows():
    because = f" ({row.reason})" if row.reason else ""
    print(f"{len(row.modules):4} modules: {row.stored_scheme} -> {row.delivered_mode}{because}")
for warning in inspection.warnings:
    print("warning:", warning)
for problem in inspection.problems:
    print("problem:", problem)
