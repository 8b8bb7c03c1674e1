"""Every architecture from a compressed-tensors directory to logits, against transformers' own model.

That model holds the exact dequantized weights, so a row out of place, a lost bias or another rotary base shows at once.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, tiny_config, write_checkpoint
from installed_transformers import in_dtype, typed_config
from library_builder import Written, write_library_checkpoint
from torch import Tensor

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.reference import load_model
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytestmark = pytest.mark.reference

TOKENS = torch.tensor([[5, 17, 3, 42, 8, 66, 90, 2, 31, 12, 55, 7]])
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MIXED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "int4-g64"),
    **dict.fromkeys(("gate_proj", "up_proj"), "fp8-channel-token"),
    "o_proj": "int8-channel",
    "down_proj": "int4-g32-asym",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": tiny_config(hidden=128, heads=4, kv_heads=2, rope_parameters=LLAMA3),
    "llama with biases": tiny_config(hidden=128, attention_bias=True, mlp_bias=True),
    "mistral": tiny_config("MistralForCausalLM", hidden=128, kv_heads=1, sliding_window=4),
    "qwen2": tiny_config("Qwen2ForCausalLM", hidden=128, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
    "qwen3": tiny_config("Qwen3ForCausalLM", hidden=128, head_dim=64, tied=True),
}
LIBRARY_SCHEMES = {"llama": "W4A16", "mistral": "FP8", "qwen2": "W4A16_ASYM", "qwen3": "FP8_DYNAMIC"}


def plain_logits(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    """Logits of transformers' own model of these weights in float32."""
    from transformers import AutoModelForCausalLM

    document = {key: value for key, value in config.items() if key not in {"quantization_config", "dtype"}}
    model = AutoModelForCausalLM.from_config(typed_config(**document), **in_dtype(torch.float32)).eval()
    told = model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    assert told.unexpected_keys == []
    assert set(told.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model(TOKENS).logits


def logits(directory: Path) -> Tensor:
    model: Any = load_model(directory, dtype=torch.float32, quantize_activations=False)
    with torch.no_grad():
        return model(TOKENS).logits


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """The largest difference, in standard deviations of the logits."""
    assert float((got - want).abs().max() / want.std()) < tolerance


@pytest.fixture(scope="module", params=MODELS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return write_checkpoint(
        tmp_path_factory.mktemp("source"), config=MODELS[request.param], scheme=MIXED, kv=True, shards=2
    )


class TestBuilt:
    """Checkpoints of four schemes at once, built without the library."""

    def test_the_source_gives_the_logits_of_its_exact_weights(self, built: Built):
        assert not inspect_checkpoint(built.directory).problems

        assert_near(logits(built.directory), plain_logits(built.config, built.dense), 1e-4)

    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_conversions_are_verified_and_give_them_too(self, built: Built, tmp_path: Path, to: str):
        want = plain_logits(built.config, built.dense)
        for dtype, tolerance in (("float32", 1e-4), ("auto", 5e-2)):
            out = tmp_path / dtype
            convert_checkpoint(built.directory, out, to=to, dtype=dtype)

            assert verify_checkpoint(built.directory, out).good
            assert_near(logits(out), want, tolerance)

    def test_transformers_reads_the_dense_conversion(self, built: Built, tmp_path: Path):
        """Configuration and weights together, without any code of ours."""
        from transformers import AutoModelForCausalLM

        convert_checkpoint(built.directory, tmp_path / "out", to="dense", dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **in_dtype(torch.float32))

        with torch.no_grad():
            assert_near(model(TOKENS).logits, plain_logits(built.config, built.dense), 1e-4)


@pytest.mark.library
class TestWrittenByTheLibrary:
    @pytest.fixture(scope="class", params=LIBRARY_SCHEMES)
    @classmethod
    def written(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
        directory, scheme = tmp_path_factory.mktemp("library"), LIBRARY_SCHEMES[request.param]
        return write_library_checkpoint(
            directory, config=MODELS[request.param], scheme=scheme, kv=scheme.startswith("FP8")
        )

    def test_the_library_and_we_give_the_same_model(self, written: Written, tmp_path: Path):
        """Its decompressed weights are rounded to bfloat16, so ours are compared in that dtype."""
        assert not inspect_checkpoint(written.directory).problems
        want = plain_logits(written.config, written.dense)

        assert_near(logits(written.directory), want, 5e-2)
        for to in ("modelopt", "dense"):
            convert_checkpoint(written.directory, tmp_path / to, to=to)
            assert verify_checkpoint(written.directory, tmp_path / to).good
            assert_near(logits(tmp_path / to), want, 1e-4 if to == "dense" else 5e-2)


@pytest.mark.parametrize("to", ["modelopt", "dense"])
def test_a_rotary_base_that_only_the_newer_spelling_tells_reaches_every_reader(tmp_path: Path, to: str) -> None:
    """Transformers 4 falls back to theta 10000 without a word where it finds only `rope_parameters`."""
    config = MODELS["llama"]
    assert not config.keys() & {"rope_theta", "rope_scaling"}
    built = write_checkpoint(tmp_path / "source", config=config, scheme="int4-g64")
    convert_checkpoint(built.directory, tmp_path / "out", to=to)

    converted = json.loads((tmp_path / "out" / "config.json").read_text())

    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert converted["rope_parameters"] == LLAMA3
    assert (converted["rope_theta"], converted["rope_scaling"]) == (500000.0, scaling)
    want = plain_logits(config, built.dense)
    assert_near(logits(tmp_path / "out"), want, 5e-2)
    fallen_back = plain_logits(config | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, built.dense)
    assert float((fallen_back - want).abs().max() / want.std()) > 0.1
