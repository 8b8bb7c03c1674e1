"""Files of calibrations: what is read, what is refused, and scales that a checkpoint stores itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import tiny_config, write_checkpoint
from safetensors.torch import load_file, save_file
from stored_schemes import SCHEMES, Scheme, int8_inputs, int_weights

from trtllm_ct.base.errors import CatalogError, OutputError, PayloadError, PlanError, UsageError
from trtllm_ct.pipeline.calibration import (
    asked_requantization,
    check_calibration_place,
    read_calibration,
    write_calibration,
)
from trtllm_ct.pipeline.open import open_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SCALES = {"model.layers.0.mlp.experts.0.up_proj": 0.25, "a": 2.0**-20, "ü.b": 448.0}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_calibration(tmp_path / "scales", SCALES)

    assert read_calibration(tmp_path / "scales").scales == SCALES
    stored = load_file(tmp_path / "scales")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        f"{name}.input_scale": (torch.float32, ()) for name in SCALES
    }
    assert [path.name for path in tmp_path.iterdir()] == ["scales"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scales_of_each_float_dtype_are_read_and_other_tensors_left(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    scale = torch.full(shape, 0.375, dtype=dtype)
    save_file({"x.input_scale": scale, "x.weight": torch.zeros(3, 5), "x.weight_scale": -scale}, tmp_path / "scales")

    assert read_calibration(str(tmp_path / "scales")).scales == {"x": 0.375}


WRONG: dict[str, Tensor] = {
    "zero": torch.tensor(0.0),
    "negative": torch.tensor(-1.0),
    "nan": torch.tensor(torch.nan),
    "inf": torch.tensor(torch.inf),
    "subnormal": torch.tensor(2.0**-149),
    "too small": torch.tensor(2.0**-126),
    "too large": torch.tensor(torch.finfo(torch.float32).max),
    "rows": torch.ones(2),
    "empty": torch.ones(0),
    "codes": torch.ones((), dtype=torch.int32),
}


def test_all_scales_that_are_none_are_reported_together(tmp_path: Path) -> None:
    good = {"good.input_scale": torch.tensor(1.0)}
    save_file({f"{name}.input_scale": tensor for name, tensor in WRONG.items()} | good, tmp_path / "scales")

    with pytest.raises(PayloadError) as error:
        read_calibration(tmp_path / "scales")

    assert {fault.where for fault in error.value.faults} == {f"{name}.input_scale" for name in WRONG}


def test_scales_of_an_export_in_nvfp4_are_no_scales_of_fp8(tmp_path: Path) -> None:
    """ModelOpt calls both `input_scale`; a sixth would let inputs saturate. Its int4 codes are in bytes too."""
    scale, codes = torch.tensor(0.5), torch.zeros(16, 8, dtype=torch.uint8)
    file = {
        "a.input_scale": scale.clone(),
        "a.weight": codes.clone(),
        "a.weight_scale": torch.ones(16, 1).to(torch.float8_e4m3fn),
        "b.input_scale": scale.clone(),
        "b.weight": codes.clone(),
        "b.weight_scale": torch.ones(16, 1),
    }
    save_file(file, tmp_path / "both")

    with pytest.raises(PayloadError) as error:
        read_calibration(tmp_path / "both")

    assert [fault.where for fault in error.value.faults] == ["a.input_scale"]
    save_file({name: tensor for name, tensor in file.items() if name.startswith("b.")}, tmp_path / "one")
    assert read_calibration(tmp_path / "one").scales == {"b": 0.5}


def test_files_without_scales_are_refused(tmp_path: Path) -> None:
    save_file({"x.weight": torch.zeros(3)}, tmp_path / "weights")
    (tmp_path / "text").write_text("not a tensor file at all")

    with pytest.raises(CatalogError, match=r"MODULE\.input_scale"):
        read_calibration(tmp_path / "weights")
    with pytest.raises(CatalogError):
        read_calibration(tmp_path / "text")
    with pytest.raises(UsageError, match="no such file"):
        read_calibration(tmp_path / "nowhere")
    with pytest.raises(UsageError):
        read_calibration(tmp_path)


@pytest.mark.parametrize("words", [None, "experts=fp8-block", {"linears": "nvfp4"}])
def test_a_calibration_that_nothing_reads_is_a_usage_error(tmp_path: Path, words: object) -> None:
    write_calibration(tmp_path / "scales", SCALES)

    with pytest.raises(UsageError, match="--calibration"):
        asked_requantization(words, tmp_path / "scales")


def test_only_a_new_file_in_a_folder_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    check_calibration_place(tmp_path / "new", tmp_path / "model")

    for place in ("there", "nowhere/new"):
        with pytest.raises(UsageError):
            check_calibration_place(tmp_path / place, tmp_path / "model")
    with pytest.raises(OutputError):
        write_calibration(tmp_path / "nowhere/new", SCALES)


def test_no_file_is_added_to_the_checkpoint_that_is_measured(tmp_path: Path) -> None:
    """It would be one of its weight files."""
    (tmp_path / "model").mkdir()

    with pytest.raises(UsageError, match="inside"):
        check_calibration_place(tmp_path / "model/scales.safetensors", tmp_path / "model")


def test_scales_that_the_checkpoint_stores_need_no_file(tmp_path: Path) -> None:
    """int4 codes with static FP8 inputs: the same scales serve NVFP4, over 6."""
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=256)
    schemes = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g128-fp8-static")
    built = write_checkpoint(tmp_path / "in", config=config, scheme=schemes)
    checkpoint = open_checkpoint(built.directory)
    name = "model.layers.1.mlp.experts.2.down_proj"

    plan = checkpoint.plan(sm=100, requantize=asked_requantization("experts=nvfp4-w4a4"))

    own = float(built.stored[f"{name}.input_scale"].float())
    given = {delivery.name: delivery.operation for delivery in plan.module(name).deliveries}[f"{name}.input_scale"]
    assert given.value == own / 6  # type: ignore[attr-defined]
    assert plan.module(name).ignored == {"input_scale": "the scale of the input is that of the calibration"}

    write_calibration(tmp_path / "scales", {name: 3 * own})
    asked = asked_requantization("experts=nvfp4-w4a4", tmp_path / "scales")
    plan = checkpoint.plan(sm=100, requantize=asked)
    given = {delivery.name: delivery.operation for delivery in plan.module(name).deliveries}[f"{name}.input_scale"]
    assert given.value == pytest.approx(own / 2, rel=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_scales_of_other_codes_than_fp8_say_nothing_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symmetric: bool
) -> None:
    """Those of int8 inputs are the largest magnitude over 127, or a range over 255, and not a magnitude over 448."""
    inputs = int8_inputs("tensor", symmetric=symmetric)
    monkeypatch.setitem(SCHEMES, "int8 inputs", Scheme(weights=int_weights(4, group_size=128), inputs=inputs))
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=256)
    schemes = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int8 inputs")
    built = write_checkpoint(tmp_path / "in", config=config, scheme=schemes)
    checkpoint = open_checkpoint(built.directory)
    experts = [name.rpartition(".")[0] for name in built.dense if ".experts." in name]
    assert f"{experts[0]}.input_scale" in checkpoint.catalog.tensors

    with pytest.raises(PlanError, match=rf"none for {len(experts)} of {len(experts)}"):
        checkpoint.plan(sm=100, requantize=asked_requantization("experts=nvfp4-w4a4"))

    write_calibration(tmp_path / "scales", dict.fromkeys(experts, 0.5))
    asked = asked_requantization("experts=nvfp4-w4a4", tmp_path / "scales")
    assert checkpoint.plan(sm=100, requantize=asked).requantized == {"experts": "nvfp4-w4a4"}


def test_a_scale_of_the_file_goes_before_a_stored_one_under_another_name(tmp_path: Path) -> None:
    """As of a LoRA wrapper, whose names nobody else uses: two scales of one module, and the user's is the last word."""
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=256)
    schemes = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g128-fp8-static")
    built = write_checkpoint(tmp_path / "in", config=config, scheme=schemes)
    name = "model.layers.1.mlp.experts.2.down_proj"
    path = built.directory / "model.safetensors"
    stored = {key.replace(f"{name}.", f"{name}.base_layer."): tensor for key, tensor in load_file(path).items()}
    save_file(stored, path)
    write_calibration(tmp_path / "scales", {name: 48.0})

    asked = asked_requantization("experts=nvfp4-w4a4", tmp_path / "scales")
    plan = open_checkpoint(built.directory).plan(sm=100, requantize=asked)

    given = {delivery.name: delivery.operation for delivery in plan.module(name).deliveries}[f"{name}.input_scale"]
    assert given.value == 8.0  # type: ignore[attr-defined]


def test_a_stored_scale_that_is_none_is_refused_only_if_it_is_read(tmp_path: Path) -> None:
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=256)
    schemes = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g128-fp8-static")
    built = write_checkpoint(tmp_path / "in", config=config, scheme=schemes)
    path = built.directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.2.down_proj.input_scale"
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, path)
    checkpoint = open_checkpoint(built.directory)

    checkpoint.plan(sm=100)
    with pytest.raises(PayloadError, match=r"2\.down_proj\.input_scale"):
        checkpoint.plan(sm=100, requantize=asked_requantization("experts=nvfp4-w4a4"))


def test_modules_without_a_scale_are_named_together(tmp_path: Path) -> None:
    config = tiny_config("Qwen3MoeForCausalLM", hidden=256, moe_intermediate_size=256)
    built = write_checkpoint(
        tmp_path / "in", config=config, scheme=dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g128")
    )
    experts = sorted({name.rpartition(".")[0] for name in built.dense if ".experts." in name})
    write_calibration(tmp_path / "scales", dict.fromkeys(experts[3:], 0.5))
    checkpoint = open_checkpoint(built.directory)

    with pytest.raises(PlanError) as error:
        checkpoint.plan(sm=90, requantize=asked_requantization("experts=w4a8-awq", tmp_path / "scales"))

    (fault,) = error.value.faults
    assert fault.where == str(tmp_path / "scales")
    found, _, names = fault.found.partition(": ")
    assert (found, sorted(names.split(", "))) == (f"none for 3 of {len(experts)}", experts[:3])
    with pytest.raises(PlanError, match=f"{len(experts)} of {len(experts)}"):
        checkpoint.plan(sm=90, requantize=asked_requantization("experts=w4a8-awq"))
