"""Quantization methods by the names that configurations use: a noun phrase for each, and what to do with it.

The names are those of `QuantizationMethod` in transformers 5.23 and of the registries of vLLM, plus a few names of this
package for blocks without a name. A remedy that mentions TensorRT-LLM refers to what its PyTorch backend loads by
itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COMPRESSED_TENSORS", "ENGINE_BUILD", "MODELOPT", "SIDECAR", "UNKNOWN", "QuantMethod", "describe_method"]

COMPRESSED_TENSORS = "compressed-tensors"
ENGINE_BUILD = "trtllm-build"
MODELOPT = "modelopt"
SIDECAR = "trtllm-ct-sidecar"
UNKNOWN = "unknown"

_REQUANTIZE = (
    "Quantize the original model with llm-compressor, or look for a compressed-tensors twin of this checkpoint."
)
_LOADED_AS_IS = "Give the directory to TensorRT-LLM as it is; it loads this format by itself."


@dataclass(frozen=True, slots=True)
class QuantMethod:
    """A quantization method.

    `name` is a noun phrase for its checkpoints, and `remedy` a sentence that says what to do instead of loading them
    here.
    """

    name: str
    remedy: str = _REQUANTIZE


_UNQUANTIZED = QuantMethod(
    "an unquantized checkpoint",
    "Give the directory to TensorRT-LLM as it is; there is nothing to convert.",
)

_METHODS: Mapping[str, QuantMethod] = {
    COMPRESSED_TENSORS: QuantMethod("a compressed-tensors checkpoint", "It loads here as it is."),
    MODELOPT: QuantMethod("a ModelOpt checkpoint", _LOADED_AS_IS),
    ENGINE_BUILD: QuantMethod(
        "an engine-build checkpoint",
        "Build an engine of it with trtllm-build of TensorRT-LLM up to 1.2.1, the only program that reads it; "
        "trtllm-ct verify SOURCE DIR compares it with the checkpoint that it was made from.",
    ),
    SIDECAR: QuantMethod(
        "a sidecar of trtllm-ct, which holds no weights",
        "Give its source; only LLM takes a sidecar, together with CompressedTensorsCheckpointLoader().",
    ),
    UNKNOWN: QuantMethod(
        "a checkpoint of an unnamed quantization method",
        'If compressed-tensors wrote it, add "quant_method": "compressed-tensors" to the block.',
    ),
    "gptq": QuantMethod(
        "an AutoGPTQ checkpoint",
        "Quantize the original model with llm-compressor's GPTQModifier, or look for a compressed-tensors twin.",
    ),
    "awq": QuantMethod(
        "an AutoAWQ checkpoint",
        "Convert it with compressed-tensors: convert_checkpoint and AutoAWQConverter, both in "
        "compressed_tensors.entrypoints.convert.",
    ),
    "fp8": QuantMethod(
        "an FP8 checkpoint in DeepSeek's form",
        "TensorRT-LLM loads the kind with 128x128 blocks by itself; give it the directory as it is.",
    ),
    "mxfp4": QuantMethod("an MXFP4 checkpoint in gpt-oss's form", _LOADED_AS_IS),
    "mxfp8": QuantMethod("an MXFP8 checkpoint of transformers", _LOADED_AS_IS),
    "nvfp4": QuantMethod("an NVFP4 checkpoint of transformers", _LOADED_AS_IS),
    "mistral-fp8": QuantMethod(
        "an FP8 checkpoint in Mistral's own form",
        "TensorRT-LLM reads it with checkpoint_format='mistral'; or quantize the original model with llm-compressor.",
    ),
    "gguf": QuantMethod(
        "a GGUF checkpoint",
        "GGUF is llama.cpp's format; take the original Hugging Face repository or a compressed-tensors twin.",
    ),
    "aqlm": QuantMethod("an AQLM checkpoint"),
    "auto-round": QuantMethod(
        "an AutoRound checkpoint",
        "Export it again with AutoRound's llm_compressor format, which is compressed-tensors.",
    ),
    "bitnet": QuantMethod("a BitNet checkpoint"),
    "bitsandbytes": QuantMethod("a bitsandbytes checkpoint"),
    "deepspeedfp": QuantMethod("a DeepSpeed FP checkpoint"),
    "eetq": QuantMethod("an EETQ checkpoint"),
    "exl2": QuantMethod("an ExLlamaV2 checkpoint"),
    "exl3": QuantMethod("an ExLlamaV3 checkpoint"),
    "fbgemm-fp8": QuantMethod("an FBGEMM FP8 checkpoint"),
    "fouroversix": QuantMethod("a Four Over Six checkpoint"),
    "fp-quant": QuantMethod("an FP-Quant checkpoint"),
    "higgs": QuantMethod("a HIGGS checkpoint"),
    "hqq": QuantMethod("an HQQ checkpoint"),
    "marlin": QuantMethod("a Marlin checkpoint of AutoGPTQ"),
    "mlx": QuantMethod("an MLX checkpoint"),
    "quanto": QuantMethod("an optimum-quanto checkpoint"),
    "quark": QuantMethod("an AMD Quark checkpoint"),
    "sinq": QuantMethod("a SINQ checkpoint"),
    "spqr": QuantMethod("an SpQR checkpoint"),
    "torchao": QuantMethod("a torchao checkpoint"),
    "vptq": QuantMethod("a VPTQ checkpoint"),
}


def describe_method(method: str | None) -> QuantMethod:
    """Return the entry of a method; its name may be spelled with dashes or underscores.

    None stands for a checkpoint without quantization. A method that is not known gets an entry made from its name.
    """
    if method is None:
        return _UNQUANTIZED
    known = _METHODS.get(method.replace("_", "-").removeprefix("intel/"))
    return known or QuantMethod(f"a checkpoint of the method {method!r}")
