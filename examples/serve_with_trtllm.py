"""Generate text from a compressed-tensors checkpoint, with TensorRT-LLM if it is installed, otherwise on the CPU.

python examples/serve_with_trtllm.py [MODEL [TENSOR_PARALLEL_SIZE]]    MODEL is a directory or a Hugging Face id
"""

import logging
import sys
from pathlib import Path

import trtllm_ct
from trtllm_ct import LLM, SamplingParams


def main() -> None:
    """Continue two prompts with the model given on the command line, or with the bundled model."""
    model = sys.argv[1] if len(sys.argv) > 1 else Path(trtllm_ct.__file__).parent / "cli" / "demo_data"
    ranks = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with LLM(model=model, tensor_parallel_size=ranks) as llm:
        for out in llm.generate(["The import statement", "A class definition"], SamplingParams(max_tokens=32)):
            print(f"{out.prompt}{out.outputs[0].text}")
            print(f"({len(out.outputs[0].token_ids)} tokens, {out.outputs[0].finish_reason})\n")


# Worker processes of TensorRT-LLM import this file again, so it must run nothing when it is imported.
if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # Shows which engine runs, and why.
    main()
