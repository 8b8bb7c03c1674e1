"""Multimodal checkpoints: the causal language model of `text_config` is built from the language model's tensors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from installed_transformers import in_dtype, is_installed, typed_config
from safetensors.torch import load_file, save_file

from trtllm_ct.base.errors import PlanError
from trtllm_ct.reference import ReferenceLinear, load_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.reference

TOKENS = torch.arange(2, 22)[None]
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    # Not half the hidden size: transformers 5 tells the order of stacked experts by their shapes, and a square one is
    # saved in the other order than the one it is published in.
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
VISION = SMALL | {"image_size": 28, "patch_size": 14}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
INTERLEAVED = {"rope_parameters": MROPE | {"mrope_interleaved": True}}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}


def pieces(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    return {"text_config": TEXT | text, "vision_config": vision}


MODELS: dict[str, dict[str, Any]] = {
    "llava": pieces({"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}),
    "mistral3": pieces({"model_type": "mistral"}, VISION | {"model_type": "pixtral"}),
    "gemma3": pieces(LAYERS, VISION | {"model_type": "siglip_vision_model"}) | {"mm_tokens_per_image": 4},
    "qwen2_5_vl": pieces({"rope_parameters": MROPE}, QWEN_VISION) | {"vision_start_token_id": 30},
    "qwen3_vl": pieces(INTERLEAVED, QWEN_VISION),
    "qwen3_vl_moe": pieces(INTERLEAVED, QWEN_VISION),
}
# The prefixes of the language model before transformers 4.52 and since; Qwen-VL had no separate prefix before.
GENERATIONS = [
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
    ("model.", "lm_head."),
]


@pytest.fixture
def save_multimodal(tmp_path: Path) -> Callable[..., Path]:
    """`save_multimodal("mistral3")` returns a directory with a random model of that type, saved by transformers."""

    def save(model_type: str, **fields: Any) -> Path:
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(7)
        fields = {"tie_word_embeddings": False} | fields
        blocks = MODELS[model_type]
        # transformers 4 reads the flag from the text part, transformers 5 from the whole.
        text = blocks["text_config"] | {"tie_word_embeddings": fields["tie_word_embeddings"]}
        config = typed_config(model_type, **(blocks | {"text_config": text} | fields))
        model = AutoModelForImageTextToText.from_config(config, **in_dtype(torch.float32))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / model_type)
        return tmp_path / model_type

    return save


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(directory / "model.safetensors"))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("model_type", [name for name in MODELS if is_installed(name)])
@pytest.mark.parametrize("tied", [False, True])
def test_text_alone_equals_the_multimodal_model(
    save_multimodal: Callable[..., Path], model_type: str, tied: bool
) -> None:
    from transformers import AutoModelForImageTextToText

    directory = save_multimodal(model_type, tie_word_embeddings=tied)

    want = AutoModelForImageTextToText.from_pretrained(directory, **in_dtype(torch.float32)).eval()
    got: Any = load_model(directory, dtype=torch.float32)

    assert torch.allclose(logits(want), logits(got), atol=1e-6)
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(("body", "head"), GENERATIONS)
def test_every_generation_of_names_is_read(save_multimodal: Callable[..., Path], body: str, head: str) -> None:
    directory = save_multimodal("mistral3")
    want = logits(load_model(directory, dtype=torch.float32))

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = GENERATIONS[0]
        renamed = {name.replace(old[1], head).replace(old[0], body): tensor for name, tensor in tensors.items()}
        return renamed | {"mtp.fc.weight": torch.zeros(1)}

    rewrite(directory, rename)

    assert torch.equal(want, logits(load_model(directory, dtype=torch.float32)))


@pytest.mark.newest_transformers
def test_published_stacks_of_qwen3_vl_are_transposed(save_multimodal: Callable[..., Path]) -> None:
    """Its publishers store [E, in, out]; transformers 5 writes [E, out, in]."""
    directory = save_multimodal("qwen3_vl_moe")
    want = logits(load_model(directory, dtype=torch.float32))

    rewrite(directory, lambda ts: {n: t.mT.contiguous() if ".experts." in n else t for n, t in ts.items()})

    assert torch.equal(want, logits(load_model(directory, dtype=torch.float32)))


def test_a_quantized_language_part_beside_a_plain_tower(save_multimodal: Callable[..., Path]) -> None:
    """`hf_quant_config.json` uses the names of the checkpoint, including prefixes."""
    directory = save_multimodal("mistral3")

    def quantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [name for name in tensors if name.endswith("up_proj.weight") and "language" in name]:
            scale = tensors[name].abs().amax(1) / 127
            tensors |= {name: (tensors[name] / scale[:, None]).round().to(torch.int8), f"{name}_scale": scale}
        return tensors

    rewrite(directory, quantize)
    layers = {f"language_model.model.layers.{layer}.mlp.up_proj": {"quant_algo": "W8A16"} for layer in range(2)}
    content = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    (directory / "hf_quant_config.json").write_text(json.dumps(content))

    model = load_model(directory)

    quantized = {name for name, module in model.named_modules() if isinstance(module, ReferenceLinear)}
    assert quantized == {f"model.layers.{layer}.mlp.up_proj" for layer in range(2)}


def test_the_language_part_must_be_complete(save_multimodal: Callable[..., Path]) -> None:
    directory = save_multimodal("mistral3")
    rewrite(directory, lambda tensors: {name: tensor for name, tensor in tensors.items() if "up_proj" not in name})

    with pytest.raises(PlanError) as caught:
        load_model(directory)

    assert [fault.where for fault in caught.value.faults] == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]


def test_a_tensor_of_the_language_part_that_fits_nowhere_is_a_fault(save_multimodal: Callable[..., Path]) -> None:
    directory = save_multimodal("mistral3")
    name = "language_model.model.layers.0.mlp.up_proj.weight_scale"
    rewrite(directory, lambda tensors: tensors | {name: torch.zeros(1)})

    with pytest.raises(PlanError, match=rf"^{name}: expected weight and bias only"):
        load_model(directory)


def test_two_generations_of_names_at_once_are_two_models(save_multimodal: Callable[..., Path]) -> None:
    directory = save_multimodal("mistral3")
    rewrite(directory, lambda tensors: tensors | {"model.language_model.norm.weight": torch.zeros(32)})

    with pytest.raises(PlanError, match="expected one tensor of this name"):
        load_model(directory)
