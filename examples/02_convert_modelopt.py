"""Convert a checkpoint to a directory that stock TensorRT-LLM loads.

python examples/02_convert_modelopt.py [DIR [OUT]]    OUT is by default a temporary directory
"""

import sys
import tempfile
from pathlib import Path

import trtllm_ct
from trtllm_ct import convert_checkpoint

directory = sys.argv[1] if len(sys.argv) > 1 else Path(trtllm_ct.__file__).parent / "cli" / "demo_data"

with tempfile.TemporaryDirectory() as work:
    out = sys.argv[2] if len(sys.argv) > 2 else Path(work) / "converted"
    report = convert_checkpoint(directory, out, to="modelopt")
    print(f"{report.plan.stored_bytes} bytes -> {report.plan.delivered_bytes} bytes in {report.seconds:.1f} s")
    for mode, count in report.modes.items():
        print(f"{count:4} modules: {mode}")
    for module in report.plan.modules:
        if module.dequantized:
            print(f"dequantized {module.name}: {module.reason}")
    print(*sorted(path.name for path in Path(out).iterdir()))
