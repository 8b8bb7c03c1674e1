"""Load weights into memory, one module at a time.

The tensors have Hugging Face names and the layouts that the Linear modules of an engine read.

python examples/03_load_weights.py [DIR]
"""

import sys
from pathlib import Path

import trtllm_ct
from trtllm_ct import CompressedTensorsConfigLoader, CompressedTensorsWeightLoader

directory = sys.argv[1] if len(sys.argv) > 1 else Path(trtllm_ct.__file__).parent / "cli" / "demo_data"

config = CompressedTensorsConfigLoader().load(directory)
print("quant_algo:", config.quant_config.quant_algo, "excluded:", *config.quant_config.exclude_modules)

loader = CompressedTensorsWeightLoader(decompressor="native")
for module, tensors in loader.stream(directory, layout="native"):
    print(module)
    for name, tensor in tensors.items():
        print(f"  {name.removeprefix(module + '.')}: {tensor.dtype} {list(tensor.shape)}")
