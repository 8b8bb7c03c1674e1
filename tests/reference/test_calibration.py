"""Scales of inputs that the reference engine measures are those of the model's own inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file

from trtllm_ct.base.errors import PayloadError, UsageError
from trtllm_ct.engine.requantization import Requantize
from trtllm_ct.pipeline.calibration import asked_requantization, write_calibration
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.reference import load_model, measure_scales
from trtllm_ct.reference.generate import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.reference

TEXT = "the import statement of a module, and of another module " * 4
EXPERTS = dict.fromkeys(("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"), "int4-g128")


def mixture(path: Path, architecture: str = "Qwen3MoeForCausalLM", **more: Any) -> Built:
    sizes = {"hidden": 256, "intermediate": 256, "vocabulary": 300}
    experts = {} if architecture == "MixtralForCausalLM" else {"moe_intermediate_size": 256}
    config = tiny_config(architecture, **sizes, **experts)
    return write_checkpoint(path, config=config, scheme=EXPERTS | more, tokenizer=True)


def inputs_of(model: Any, leaf: str, tokens: list[int]) -> Iterator[tuple[str, float]]:
    """The largest magnitude that each module of this name gets, from hooks of the test's own."""
    found: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if name.endswith(leaf):
            module.register_forward_hook(
                lambda _module, given, _made, name=name: found.setdefault(name, []).append(float(given[0].abs().max()))
            )
    with torch.no_grad():
        model(torch.tensor([tokens]))
    yield from ((name, max(peaks)) for name, peaks in found.items())


@pytest.mark.parametrize("leaf", ["experts.0.up_proj", "experts.2.down_proj", "o_proj"])
def test_scales_are_the_largest_magnitudes_over_448(tmp_path: Path, leaf: str) -> None:
    built = mixture(tmp_path, q_proj="int4-g128")
    tokens = load_tokenizer(str(tmp_path))(TEXT)["input_ids"]
    model = load_model(built.directory, dtype=torch.float32, quantize_activations=False)

    measured = measure_scales(built.directory, TEXT)

    want = dict(inputs_of(model, leaf, tokens))
    assert want
    assert (measured.tokens, measured.window) == (len(tokens), len(tokens))
    for name, peak in want.items():
        assert measured.scales[name] == peak / 448


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_the_scales_are_those_that_planning_asks_for(tmp_path: Path, architecture: str) -> None:
    """By the names of the files, whatever transformers calls the modules."""
    built = mixture(tmp_path / "in", architecture)
    measured = measure_scales(built.directory, TEXT)
    write_calibration(tmp_path / "scales", measured.scales)
    checkpoint = open_checkpoint(built.directory)

    plan = checkpoint.plan(sm=90, requantize=asked_requantization("experts=w4a8-awq", tmp_path / "scales"))

    assert plan.requantized == {"experts": "w4a8-awq"}
    assert not checkpoint.plan(sm=90, requantize=Requantize()).requantized


def test_windows_change_no_names_and_fewer_tokens_no_scale_upwards(tmp_path: Path) -> None:
    built = mixture(tmp_path)
    whole = measure_scales(built.directory, TEXT, window=16)
    part = measure_scales(built.directory, TEXT, window=16, max_tokens=48)

    assert list(whole.scales) == list(part.scales)
    assert (part.tokens, part.window) == (48, 16)
    reached = set(part.scales) - set(part.unreached)
    assert all(part.scales[name] <= whole.scales[name] for name in reached)


def test_experts_that_no_token_reached_are_named_and_get_the_largest_scale_of_their_layer(tmp_path: Path) -> None:
    measured = measure_scales(mixture(tmp_path).directory, TEXT, max_tokens=2)

    assert measured.unreached
    assert measured.to_dict()["unreached"] == list(measured.unreached)
    for name in measured.unreached:
        experts, _, leaf = name.rpartition(".")
        alike = [scale for other, scale in measured.scales.items() if other.startswith(experts.rpartition(".")[0])]
        same = [
            scale
            for other, scale in measured.scales.items()
            if other.startswith(experts.rpartition(".")[0]) and other.endswith(f".{leaf}")
        ]
        assert measured.scales[name] == max(same) in alike


def test_a_text_without_tokens_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two tokens"):
        measure_scales(mixture(tmp_path).directory, "")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.nan, PayloadError),
        (torch.inf, PayloadError),
        (1e34, PayloadError),
        (1e-34, PayloadError),
        (0.0, UsageError),
    ],
)
def test_inputs_that_have_no_scale_are_refused_with_the_names_of_their_modules(
    tmp_path: Path, value: float, error: type[Exception]
) -> None:
    built = mixture(tmp_path)
    path = built.directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.post_attention_layernorm.weight"].fill_(value)
    save_file(tensors, path, metadata={"format": "pt"})

    with pytest.raises(error, match=r"layers\.1\.mlp\.experts\."):
        measure_scales(built.directory, TEXT)


def test_the_same_text_gives_the_same_scales(tmp_path: Path) -> None:
    built = mixture(tmp_path)

    assert measure_scales(built.directory, TEXT).scales == measure_scales(built.directory, TEXT).scales
