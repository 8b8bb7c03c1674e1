"""Folded weights compared with the library's online transforms: one Linear per transform, then whole checkpoints."""

from __future__ import annotations

import json
from itertools import product
from typing import TYPE_CHECKING, Any

import library_builder
import pytest
import torch
from installed_library import attach_schemes
from installed_transformers import in_dtype, typed_config
from on_tensors import NATIVE, arrays, run
from tiny_models import tiny_config
from torch import Tensor, nn

from trtllm_ct import CompressedTensorsWeightLoader, convert_checkpoint, verify_checkpoint
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.config.quantization_config import Transform
from trtllm_ct.plan.online_transforms import folds_of
from trtllm_ct.plan.ops import FoldPlain, ModuleTensors
from trtllm_ct.reference.effective_weights import effective_bias, effective_weight

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

pytestmark = pytest.mark.library

TOLERANCE = 1e-5  # the library rotates in float32
TYPES = ["hadamard", "random-hadamard", "random-matrix"]
ROWS, COLUMNS = 24, 16


def transform(kind: str = "hadamard", location: str = "input", name: str = "R", **more: Any) -> Transform:
    return Transform(name=name, type=kind, location=location, targets=("Linear",), **more)


def library_linear(transforms: Sequence[Transform], rows: int = ROWS, columns: int = COLUMNS) -> nn.Module:
    """A Linear with random weights, to which the library applies the transforms in the given order."""
    from compressed_tensors.transform import apply_transform_config

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows))
    # Dense inverses of random matrices need room for large numbers.
    apply_transform_config(model.double(), library_config(transforms, precision="torch.float64"))
    return model


def library_config(transforms: Sequence[Transform], **more: Any) -> Any:
    from compressed_tensors.transform import TransformConfig

    groups: dict[str, dict[str, Any]] = {}
    for entry in transforms:
        scheme = {"type": entry.type, "randomize": entry.randomize, "head_dim": entry.head_dim, "apply": [], **more}
        places = groups.setdefault(entry.name, scheme)["apply"]
        places.append(
            {
                "targets": list(entry.targets),
                "ignore": list(entry.ignore),
                "location": entry.location,
                "inverse": entry.inverse,
            }
        )
    return TransformConfig.model_validate({"config_groups": groups})


def folded(stored: Mapping[str, Tensor], transforms: Sequence[Transform], local: str) -> Tensor:
    """A stored tensor of a Linear with its transforms folded in, in float64."""
    folds = tuple(fold for fold in folds_of(transforms, "Linear") if local == "weight" or fold.axis == 0)
    spec = TensorSpec(DType.F64, tuple(stored[local].shape))
    module = ModuleTensors(arrays(stored), None, NATIVE.entry)
    return run(FoldPlain(result=spec, source=local, folds=folds), local, module)


def cases() -> Iterator[tuple[Transform, ...]]:
    for kind, location, inverse, randomize in product(TYPES, ["input", "output"], [False, True], [False, True]):
        size = 8 if kind == "hadamard" and location == "output" else None  # 24 rows have no Sylvester matrix
        yield (transform(kind, location, inverse=inverse, randomize=randomize, head_dim=size),)
        yield (transform(kind, location, inverse=inverse, randomize=randomize, head_dim=4),)
    rotation = transform("random-hadamard", name="A")
    # Matrices that don't commute: only the right order of both sides passes.
    yield (rotation, transform("random-matrix", name="B"), transform("hadamard", name="C", randomize=True))
    yield (
        transform("random-matrix", "output", "A"),
        transform("random-hadamard", "output", "B", inverse=True),
        transform("random-matrix", "input", "C", inverse=True),
    )
    yield (transform("hadamard", randomize=True), transform("hadamard", randomize=True, inverse=True))


@pytest.mark.parametrize("transforms", list(cases()), ids=lambda case: " ".join(str(entry) for entry in case))
def test_a_folded_linear_gives_what_the_library_computes(transforms: tuple[Transform, ...]) -> None:
    """For every type, location and option, folded weight and bias in float64 equal the library's hooks in float64."""
    model = library_linear(transforms)
    stored = {name.removeprefix("0."): tensor.detach() for name, tensor in model.state_dict().items()}
    x = torch.randn(5, COLUMNS, dtype=torch.float64)
    weight, bias = (folded(stored, transforms, local) for local in ("weight", "bias"))

    want = model(x).detach()

    assert stored.keys() > {"weight", "bias"}
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), want, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(weight, effective_weight(stored["weight"], transforms, stored), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(bias, effective_bias(stored["bias"], transforms, stored), atol=1e-9, rtol=1e-9)


CONFIG = tiny_config(dtype="float32", layers=2)
NO_HEAD = {"targets": ("Linear",), "ignore": ("lm_head",)}
DOWN = {"targets": ("re:.*down_proj$",)}
RECIPES: dict[str, tuple[Transform, ...]] = {
    "SpinQuant R4": (
        Transform(name="R4", type="hadamard", location="input", **DOWN),
        Transform(name="R4", type="hadamard", location="weight_input", inverse=True, **DOWN),
    ),
    "QuIP": (
        Transform(name="v", type="random-hadamard", location="input", **NO_HEAD),
        Transform(name="v", type="random-hadamard", location="weight_input", inverse=True, **NO_HEAD),
        Transform(name="u", type="random-hadamard", location="weight_output", **NO_HEAD),
        Transform(name="u", type="random-hadamard", location="output", inverse=True, **NO_HEAD),
    ),
    "randomized blocks": (
        Transform(name="b", type="hadamard", location="input", randomize=True, head_dim=16, **NO_HEAD),
        Transform(name="e", type="hadamard", location="output", randomize=True, targets=("Embedding",)),
        Transform(name="m", type="random-matrix", location="output", targets=("re:.*[qk]_proj$",)),
    ),
}


@pytest.mark.reference
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_checkpoint_with_online_transforms_gives_the_librarys_logits(
    tmp_path: Path, recipe: str, model_type: str
) -> None:
    """Shared matrices are stored once; Qwen2 has biases to rotate. Compared in float32 with a tolerance of 1e-5."""
    config = CONFIG | {"llama": {}, "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}}[model_type]
    tokens = torch.tensor([[1, 5, 7, 11, 13, 2]])

    want = write_transformed(tmp_path / "in", config, RECIPES[recipe], tokens)

    stored = CompressedTensorsWeightLoader().load_weights(tmp_path / "in", layout="stored")
    assert any("_input" in name or "_output" in name for name in stored)
    dense = CompressedTensorsWeightLoader().load_weights(tmp_path / "in", layout="dense")
    torch.testing.assert_close(plain_logits(config, dense, tokens), want, atol=TOLERANCE, rtol=TOLERANCE)
    report = convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert any("the online transform" in reason for reason in report.to_dict()["dequantized"].values())
    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").good


def write_transformed(
    directory: Path, config: dict[str, Any], transforms: Sequence[Transform], tokens: Tensor
) -> Tensor:
    """Save a random model that the library rotated and quantized to int8; return its logits, computed with hooks."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.transform import apply_transform_config

    model = library_builder._random_model(config, seed=3)
    apply_transform_config(model, library_config(transforms))
    int8 = {"num_bits": 8, "strategy": "channel"}
    groups = {"group_0": {"targets": ["re:.*(o|down|v)_proj$"], "weights": int8}}
    quantization = QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    attach_schemes(model, quantization)
    library_builder._calibrate(model, torch.Generator().manual_seed(0))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    compressor.decompress_model(model)
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    block = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert block["transform_config"]["config_groups"]
    return logits


def plain_logits(config: Mapping[str, Any], weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The logits of a plain transformers model with these weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(typed_config(**config), **in_dtype(torch.float32)).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits
