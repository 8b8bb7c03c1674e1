"""Plain directories of mixtures load in transformers: no key is missing or unexpected, and the logits are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, rewrite, rewrite_config, tiny_config, write_checkpoint
from fused_experts import fuse_experts
from installed_transformers import in_dtype, typed_config
from safetensors.torch import load_file

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.loader import CompressedTensorsWeightLoader
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.reference import load_model
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.reference

TOKENS = torch.tensor([[5, 17, 3, 42, 8, 66, 90, 2, 31, 12, 55, 7]])
MIXTURES = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
)
VISION = {
    "model_type": "qwen3_vl_moe",
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "int4-g32")
EXPERTS = "model.language_model.layers.0.mlp.experts"


def loaded(directory: Path, model_class: Any) -> Any:
    """The model that transformers loads, which must find each of its tensors and no other."""
    model, report = model_class.from_pretrained(directory, **in_dtype(torch.float32), output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@pytest.mark.parametrize("spelling", ["one by one", "stacked"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_one_by_one(tmp_path: Path, architecture: str, spelling: str) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture, dtype="float32")
    edit = fuse_experts if spelling == "stacked" else None
    write_checkpoint(tmp_path / "source", config=config, scheme="int4-g32", edit=edit)
    convert_checkpoint(tmp_path / "source", tmp_path / "dense", to="dense")
    golden = load_model(tmp_path / "source", dtype=torch.float32)

    model = loaded(tmp_path / "dense", AutoModelForCausalLM)

    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, golden(TOKENS).logits, rtol=1e-4, atol=1e-4)


def qwen3_vl_moe(
    directory: Path, *, inner: int, scheme: str | Mapping[str, str], store: Callable[[dict[str, Tensor]], object]
) -> Built:
    """A Qwen3-VL-MoE checkpoint; `store` changes its tensors, which have the names of a text model."""
    text = tiny_config("Qwen3MoeForCausalLM", moe_intermediate_size=inner, rope_parameters=ROPE, dtype="float32")
    built = write_checkpoint(directory, config=text, scheme=scheme)

    def rename(tensors: dict[str, Tensor]) -> None:
        store(tensors)
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)
        tensors |= vision(wrapped({}))

    def wrapped(block: dict[str, Any]) -> dict[str, Any]:
        inner_text = {key: value for key, value in text.items() if key not in {"architectures", "quantization_config"}}
        return {
            "architectures": ["Qwen3VLMoeForConditionalGeneration"],
            "model_type": "qwen3_vl_moe",
            "dtype": "float32",
            "tie_word_embeddings": False,
            "text_config": inner_text | {"model_type": "qwen3_vl_moe_text"},
            "vision_config": VISION,
        } | block

    def wrap(config: dict[str, Any]) -> None:
        block = {"quantization_config": config["quantization_config"]}
        config.clear()
        config.update(wrapped(block))

    rewrite(directory, rename)
    rewrite_config(directory, wrap)
    return built


def vision(config: Mapping[str, Any]) -> dict[str, Tensor]:
    from transformers import Qwen3VLMoeForConditionalGeneration

    document = {key: value for key, value in config.items() if key not in {"architectures", "dtype"}}
    model = Qwen3VLMoeForConditionalGeneration(typed_config(**document))
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".visual." in name}


def keep(_: dict[str, Tensor]) -> None:
    """Experts one by one, as llm-compressor stores them."""


def stack(tensors: dict[str, Tensor]) -> None:
    """[E, in, out], as transformers 4 stores plain experts."""
    fuse_experts(tensors)
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].mT.contiguous()


@pytest.mark.newest_transformers  # transformers 4 builds no Qwen3-VL without the sections of its positions
@pytest.mark.parametrize(
    ("scheme", "store", "inner"),
    [
        pytest.param("int4-g32", keep, 96, id="quantized one by one"),
        pytest.param("int4-g32", keep, 64, id="quantized, down square"),
        pytest.param(ATTENTION, keep, 96, id="plain one by one"),
        pytest.param(ATTENTION, stack, 96, id="as transformers 4"),
        pytest.param(ATTENTION, fuse_experts, 96, id="as transformers 5"),
        pytest.param(ATTENTION, stack, 32, id="as transformers 4, gate_up square"),
        pytest.param(ATTENTION, stack, 64, id="as transformers 4, down square"),
        pytest.param(ATTENTION, fuse_experts, 32, id="as transformers 5, gate_up square"),
        pytest.param(ATTENTION, fuse_experts, 64, id="as transformers 5, down square"),
    ],
)
def test_stacked_experts_are_inputs_first_whatever_the_sizes(
    tmp_path: Path, scheme: str | Mapping[str, str], store: Callable[[dict[str, Tensor]], object], inner: int
) -> None:
    """The hidden size is 64. Where a stack is square, transformers 5 reads the wrong order, and a warning says it."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    built = qwen3_vl_moe(tmp_path / "source", inner=inner, scheme=scheme, store=store)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "dense", to="dense")

    delivered = load_file(tmp_path / "dense" / "model.safetensors")
    for expert in range(4):
        gate, up, down = (
            built.dense[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"].float()
            for name in ("gate", "up", "down")
        )
        assert torch.equal(delivered[f"{EXPERTS}.gate_up_proj"][expert], torch.cat([gate, up]).T)
        assert torch.equal(delivered[f"{EXPERTS}.down_proj"][expert], down.T)
    assert verify_checkpoint(tmp_path / "source", tmp_path / "dense").good
    square = inner in {32, 64}
    assert any("both axes have the same size" in warning for warning in report.plan.warnings) is square
    golden = load_model(tmp_path / "source", dtype=torch.float32)
    converted = load_model(tmp_path / "dense", dtype=torch.float32)
    model = loaded(tmp_path / "dense", Qwen3VLMoeForConditionalGeneration)
    with torch.no_grad():
        expected = golden(TOKENS).logits
        torch.testing.assert_close(converted(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
        if not square:
            torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.model_type("qwen3_vl_moe")
@pytest.mark.parametrize(("layout", "to"), [("native", "modelopt"), ("dense", "dense")])
@pytest.mark.parametrize("store", [keep, stack, fuse_experts])
def test_the_loader_has_the_tensors_of_a_converted_directory(
    tmp_path: Path, layout: Any, to: str, store: Callable[[dict[str, Tensor]], object]
) -> None:
    scheme = {"o_proj": "int4-g64"} if store is not keep else "int4-g32"
    qwen3_vl_moe(tmp_path / "source", inner=96, scheme=scheme, store=store)
    convert_checkpoint(tmp_path / "source", tmp_path / "out", to=to)

    loaded_weights = CompressedTensorsWeightLoader().load_weights(tmp_path / "source", layout=layout)

    directory = load_file(tmp_path / "out" / "model.safetensors")
    assert loaded_weights.keys() == directory.keys()
    assert f"{EXPERTS}.gate_up_proj" in directory
    for name, tensor in directory.items():
        assert torch.equal(loaded_weights[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.model_type("qwen3_vl_moe")
def test_the_engine_reads_the_same_stacks_so_quantized_experts_are_dequantized(tmp_path: Path) -> None:
    qwen3_vl_moe(tmp_path, inner=96, scheme="fp8-channel-token", store=keep)

    plan = plan_checkpoint(tmp_path, "modelopt")

    assert {part.stack for part in plan.stacks.values()} == {
        f"model.language_model.layers.{layer}.mlp.experts.{name}"
        for layer in range(2)
        for name in ("gate_up_proj", "down_proj")
    }
    assert {(module.delivered_mode, module.reason) for module in plan.modules if module.experts} == {
        ("dequantized", "the class of the model reads its experts from one plain tensor")
    }
