"""How far two directories are apart, by the exact values that the builders know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, rewrite, tiny_config, write_checkpoint
from command_line import run_cli
from fused_experts import fuse_experts

from trtllm_ct.base.errors import UsageError
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.verify.compare import DirectoryComparison, compare_directories
from trtllm_ct.verify.source.files import TensorFiles

if TYPE_CHECKING:
    from pathlib import Path

WIDE: dict[str, Any] = {"hidden": 128, "intermediate": 256, "kv_heads": 4, "layers": 1}


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest magnitude of its row."""
    difference = (got - want).abs()
    peak = want.abs().amax(dim=-1, keepdim=True)
    return float(torch.where(difference == 0, 0.0, difference / peak).max())


def expected(one: Built, other: Built) -> dict[str, float]:
    """The errors of all modules of two checkpoints with the same names."""
    errors: dict[str, float] = {}
    for name, want in one.dense.items():
        module = name.rpartition(".")[0]
        errors[module] = max(errors.get(module, 0.0), distance(other.dense[name], want))
    return errors


def errors_of(found: DirectoryComparison) -> dict[str, float | None]:
    return {module.name: module.error for module in found.modules}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize(
    ("one", "other"),
    [("int4-g32", "fp8-block"), ("nvfp4", "int8-channel"), ("dense", "mxfp4a16"), ("int4-g64-asym", "dense")],
)
def test_errors_of_two_checkpoints_are_those_of_their_exact_values(
    tmp_path: Path, architecture: str, one: str, other: str
) -> None:
    config = tiny_config(architecture, **WIDE)
    first = write_checkpoint(tmp_path / "a", config=config, scheme=one)
    second = write_checkpoint(tmp_path / "b", config=config, scheme=other, seed=1)

    found = compare_directories(tmp_path / "a", tmp_path / "b")

    assert not found.faults
    assert errors_of(found) == pytest.approx(expected(first, second), rel=1e-12)
    same = sum(error == 0 for error in expected(first, second).values())
    assert found.verdict.startswith(f"{same} of {len(found.modules)} modules hold the same values, ")


NATIVE = [
    "int4-g128",
    "int4-channel",
    "int8-channel",
    "fp8-tensor-static",
    "fp8-channel-token",
    "fp8-block",
    "nvfp4",
    "mxfp4",
    "mxfp8",
    "dense",
]
RECIPROCAL = 2.0**-24
"""The rounding of NVFP4's scalar: it is stored as a divisor, and engines read its reciprocal."""


@pytest.mark.parametrize("scheme", NATIVE)
def test_a_directory_equals_itself_and_its_native_conversion(tmp_path: Path, scheme: str) -> None:
    """Every module is compared; those that hold nothing but scales of the KV cache are left out."""
    write_checkpoint(tmp_path / "in", config=tiny_config(**WIDE), scheme=scheme, kv=scheme != "dense")
    report = convert_checkpoint(tmp_path / "in", tmp_path / "out", engine="stock-1.3", sm=100)
    assert not any(module.dequantized for module in report.plan.modules)

    itself = compare_directories(tmp_path / "in", tmp_path / "in")
    converted = compare_directories(tmp_path / "in", tmp_path / "out")

    assert set(errors_of(itself).values()) == {0.0}
    assert {module.differing for module in itself.modules} == {0}
    assert itself.verdict.startswith(f"{len(itself.modules)} of {len(itself.modules)} modules hold the same values; ")
    assert errors_of(converted).keys() == errors_of(itself).keys()
    for name, error in errors_of(converted).items():
        assert error is not None, name
        assert error <= (RECIPROCAL if scheme == "nvfp4" else 0), name


@pytest.mark.parametrize("to", ["modelopt", "dense"])
def test_a_dequantized_weight_is_off_by_its_rounding(tmp_path: Path, to: str) -> None:
    """`verify` calls it right, as it must be rounded; here the rounding counts."""
    built = write_checkpoint(tmp_path / "in", config=tiny_config(**WIDE), scheme={"down_proj": "int8-g32"})
    convert_checkpoint(tmp_path / "in", tmp_path / "out", to=to)

    found = errors_of(compare_directories(tmp_path / "in", tmp_path / "out"))

    name = "model.layers.0.mlp.down_proj"
    want = built.dense[f"{name}.weight"]
    assert found.pop(name) == pytest.approx(distance(want.bfloat16().double(), want), rel=1e-12)
    assert set(found.values()) == {0.0}


def test_schemes_modes_and_bytes(tmp_path: Path) -> None:
    scheme = {"q_proj": "int4-g64", "k_proj": "int4-g64", "v_proj": "int4-g64", "down_proj": "int8-g32"}
    write_checkpoint(tmp_path / "in", config=tiny_config(**WIDE), scheme=scheme)
    convert_checkpoint(tmp_path / "in", tmp_path / "out")

    found = compare_directories(tmp_path / "in", tmp_path / "out")

    modules = {module.name.rpartition(".")[2]: (module.first, module.second) for module in found.modules}
    assert modules["q_proj"] == ("pack-quantized: int4 group 64", "W4A16_AWQ g64")
    assert modules["down_proj"] == ("pack-quantized: int8 group 32", "plain bfloat16")
    assert modules["o_proj"] == ("plain bfloat16", "plain bfloat16")
    for place, total in zip(("in", "out"), found.sums, strict=True):
        specs = Catalog.from_directory(tmp_path / place).specs
        assert total == sum(spec.nbytes for spec in specs.values())


def test_bytes_of_experts_in_one_tensor_are_their_shares(tmp_path: Path) -> None:
    config = tiny_config("Qwen3MoeForCausalLM", **WIDE)
    write_checkpoint(tmp_path / "a", config=config)
    built = write_checkpoint(tmp_path / "b", config=config, scheme="dense", edit=fuse_experts)

    found = compare_directories(tmp_path / "a", tmp_path / "b")

    assert found.sums[1] == sum(tensor.nbytes for tensor in built.stored.values())
    assert len([module for module in found.modules if ".experts." in module.name]) == 12
    assert not any(module.error is None for module in found.modules)


def test_modules_of_one_directory_and_of_other_shapes_have_no_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", config=tiny_config(layers=1), scheme="dense")
    write_checkpoint(tmp_path / "b", config=tiny_config(layers=2, vocabulary=64), scheme="dense")

    found = compare_directories(tmp_path / "a", tmp_path / "b")

    modules = {module.name: module for module in found.modules}
    alone = modules["model.layers.1.self_attn.q_proj"]
    assert (alone.first, alone.first_bytes, alone.second, alone.error) == (None, None, "plain bfloat16", None)
    assert modules["lm_head"].error is None
    assert modules["lm_head"].differing is None
    assert "2 can't be compared" in found.verdict
    assert "are in one directory only" in found.verdict


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_infinitely_far(tmp_path: Path, value: float) -> None:
    for name in "ab":
        write_checkpoint(tmp_path / name, config=tiny_config(**WIDE), scheme="dense")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = value

    rewrite(tmp_path / "b", damage)

    found = errors_of(compare_directories(tmp_path / "a", tmp_path / "b"))

    assert found["model.layers.0.mlp.up_proj"] == float("inf")
    assert set(found.values()) == {0.0, float("inf")}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_checkpoint_equals_itself_whatever_it_holds(tmp_path: Path, name: str, value: float) -> None:
    built = write_checkpoint(tmp_path / "a", config=tiny_config(**WIDE), scheme="dense")
    rewrite(built.directory, lambda tensors: tensors[name].view(-1)[3].fill_(value))

    found = compare_directories(built.directory, built.directory)

    assert {(module.error, module.differing) for module in found.modules} == {(0.0, 0)}
    assert "differ" not in found.verdict


def test_a_weight_that_can_not_be_decoded_is_a_fault(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", config=tiny_config(**WIDE), scheme="fp8-channel-token")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    rewrite(tmp_path / "out", lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight_scale"))

    done = run_cli("compare", tmp_path / "in", tmp_path / "out")

    assert done.code == 1
    assert "model.layers.0.self_attn.q_proj" in done.out
    assert "can't be compared" in done.out


def test_headers_alone_read_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape of a weight, which its words may not show, is two numbers."""
    write_checkpoint(tmp_path / "in", scheme="int4-g32")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    whole, names = TensorFiles.read, set()

    def read(self: TensorFiles, name: str, begin: int, nbytes: int) -> Any:
        names.add(name.rpartition(".")[2])
        return whole(self, name, begin, nbytes)

    monkeypatch.setattr(TensorFiles, "read", read)

    found = compare_directories(tmp_path / "in", tmp_path / "out", values=False)

    assert names <= {"weight_shape"}
    assert {module.error for module in found.modules} == {None}
    assert found.verdict.startswith("14 of 21 modules are stored in another way; ")


@pytest.mark.parametrize("to", ["modelopt", "engine"])
@pytest.mark.parametrize("order", [("out", "in"), ("in", "out")])
def test_what_is_no_checkpoint_is_refused_first(tmp_path: Path, to: str, order: tuple[str, str]) -> None:
    config = tiny_config(dtype="float16", hidden=128, intermediate=128)
    write_checkpoint(tmp_path / "in", config=config, scheme="int4-g64")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", to=to)
    if (to, order) == ("modelopt", ("in", "out")):
        assert not compare_directories(tmp_path / "in", tmp_path / "out").faults
        return

    with pytest.raises(UsageError) as caught:
        compare_directories(*(tmp_path / name for name in order))

    assert caught.value.faults[0].where == str(tmp_path / "out")


def test_the_report_begins_with_the_verdict_and_folds_layers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", config=tiny_config(**{**WIDE, "layers": 3}), scheme={"down_proj": "int8-g32"})
    convert_checkpoint(tmp_path / "in", tmp_path / "out")

    done = run_cli("compare", tmp_path / "in", tmp_path / "out")

    document = run_cli("compare", tmp_path / "in", tmp_path / "out", "--json").document
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[1].strip() == document["verdict"]
    assert any("model.layers.{0..2}.mlp.down_proj" in line and "int8 group 32" in line for line in lines)
