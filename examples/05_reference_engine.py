"""Generate text on the CPU with the reference engine, which computes from the same tensors as TensorRT-LLM.

python examples/05_reference_engine.py [DIR [PROMPT]]    needs the extra `reference`
"""

import sys
from pathlib import Path

import torch

import trtllm_ct
from trtllm_ct.reference import generate_text, load_model

directory = sys.argv[1] if len(sys.argv) > 1 else Path(trtllm_ct.__file__).parent / "cli" / "demo_data"
prompt = sys.argv[2] if len(sys.argv) > 2 else "The import statement combines two operations; it"

model = load_model(directory, dtype=torch.bfloat16)
print(model.get_submodule("model.layers.0.mlp"))
print(prompt, end="", flush=True)
generation = generate_text(model, prompt, max_tokens=40, on_token=lambda text: print(text, end="", flush=True))
print(f"\n({len(generation.token_ids)} tokens in {generation.seconds:.1f} s)")
