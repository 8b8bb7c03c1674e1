"""Classes with a row, from a compressed-tensors directory to logits, against transformers' own model.

That model holds the exact dequantized weights.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from class_models import CLASSES, text_of, text_tensors, write_class
from installed_transformers import in_dtype
from safetensors.torch import save_file

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.reference import load_model
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from builders import Built
    from torch import Tensor

pytestmark = pytest.mark.reference

TOKENS = torch.tensor([[5, 17, 3, 42, 8, 66, 90, 2, 31, 12, 55, 7]])
SCHEMES = ("fp8-channel-token", "int4-g128", "fp8-block", "nvfp4")
# A wrapper differs from its text model in names only.
CELLS = [(name, scheme) for name in CLASSES for scheme in (SCHEMES if "Conditional" not in name else SCHEMES[:1])]


def plain_model(directory: Path, built: Built) -> Any:
    """Transformers' own text model of the exact weights, in float32."""
    from transformers import AutoModelForCausalLM

    directory.mkdir()
    config = {key: value for key, value in text_of(built.config).items() if key != "quantization_config"}
    (directory / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.float() for name, tensor in built.dense.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(directory, **in_dtype(torch.float32)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    """The largest difference, in standard deviations of the logits."""
    assert float((got - want).abs().max() / want.std()) < tolerance


@pytest.mark.parametrize("name", CLASSES)
def test_the_tiny_models_have_the_tensors_that_transformers_has(name: str, tmp_path: Path) -> None:
    built = write_class(tmp_path / "in", name, "dense")
    model = plain_model(tmp_path / "plain", built)

    model.save_pretrained(tmp_path / "saved")

    from safetensors.torch import load_file

    saved = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "saved" / "model.safetensors").items()}
    assert saved == dict(text_tensors(built.config))


@pytest.mark.parametrize(("name", "scheme"), CELLS)
def test_source_and_conversions_give_the_logits_of_the_exact_weights(name: str, scheme: str, tmp_path: Path) -> None:
    built = write_class(tmp_path / "in", name, scheme)
    want = logits(plain_model(tmp_path / "plain", built))
    assert not inspect_checkpoint(built.directory, engine="stock-1.3").problems

    for to in ("modelopt", "dense"):
        out = tmp_path / to
        convert_checkpoint(built.directory, out, to=to, engine="stock-1.3", dtype="float32")
        assert verify_checkpoint(built.directory, out).good
        assert_near(logits(load_model(out, dtype=torch.float32, quantize_activations=False)), want, 1e-4)
    assert_near(logits(load_model(built.directory, dtype=torch.float32, quantize_activations=False)), want, 1e-4)
