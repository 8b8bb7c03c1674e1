"""verify_checkpoint: valid sources and correct conversions pass; every kind of damage is reported with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, rewrite, tiny_config, write_checkpoint
from torch import Tensor

from trtllm_ct.base.errors import CatalogError, Fault, PlanError, VerificationError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.verify.verify import VerificationReport, verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
Q, K, O = (f"{ATTENTION}.{name}_proj" for name in "qko")  # noqa: E741
GATE, DOWN = f"{MLP}.gate_proj", f"{MLP}.down_proj"
MIXED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "int4-g64"),
    **dict.fromkeys(("gate_proj", "up_proj"), "fp8-tensor-static"),
    "down_proj": "int8-g32",
}

Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Built, Path]:
    """A checkpoint with native, dequantized and unquantized modules, and the directory converted from it."""
    config = tiny_config("Qwen2ForCausalLM", hidden=128, intermediate=256, layers=1)
    built = write_checkpoint(tmp_path / "source", config=config, scheme=MIXED, kv=True)
    convert_checkpoint(built.directory, tmp_path / "out")
    return built, tmp_path / "out"


def damaged(pair: tuple[Built, Path], change: Change) -> VerificationReport:
    built, out = pair
    rewrite(out, change)
    report = verify_checkpoint(built.directory, out)
    assert not report.good
    return report


def only_fault(report: VerificationReport) -> Fault:
    (fault,) = report.faults
    return fault


class TestSource:
    @pytest.mark.parametrize(
        "scheme", ["int4-g32-asym", "int8-plain-channel", "fp8-tensor-static", "fp8-channel-token"]
    )
    def test_a_sound_checkpoint_is_good(self, tmp_path: Path, scheme: str):
        write_checkpoint(tmp_path, config=tiny_config(layers=1), scheme=scheme, kv=True)

        report = verify_checkpoint(tmp_path)

        assert report.good
        assert (report.modules, report.zero_scales, report.checks, report.converted) == (13, 0, (), None)

    def test_structure_and_companions_are_raised_by_planning(self, tmp_path: Path):
        write_checkpoint(tmp_path, edit=lambda stored: stored.pop(f"{Q}.weight_scale"))

        with pytest.raises(PlanError, match="weight_scale"):
            verify_checkpoint(tmp_path)

    def test_bad_scales_of_all_modules_are_reported_together(self, tmp_path: Path):
        def break_scales(stored: dict[str, Tensor]) -> None:
            stored[f"{Q}.weight_scale"][5] = -1
            stored[f"{K}.weight_scale"][3] = float("nan")
            stored[f"{DOWN}.weight_scale"][0] = float("inf")

        write_checkpoint(tmp_path, scheme="fp8-channel-token", edit=break_scales)

        report = verify_checkpoint(tmp_path, tmp_path / "never read")

        assert [fault.where for fault in report.faults] == [
            f"{Q}.weight_scale[5, 0]",
            f"{K}.weight_scale[3, 0]",
            f"{DOWN}.weight_scale[0, 0]",
        ]
        with pytest.raises(VerificationError) as caught:
            report.raise_if_bad()
        assert caught.value.faults == report.faults

    @pytest.mark.parametrize("code", [0x7F, 0xFF])
    def test_a_nan_code_is_a_fault_with_its_index(self, tmp_path: Path, code: int):
        def write(stored: dict[str, Tensor]) -> None:
            stored[f"{DOWN}.weight"].view(torch.uint8)[7, 30] = code

        write_checkpoint(tmp_path, scheme="fp8-channel-token", edit=write)

        fault = only_fault(verify_checkpoint(tmp_path))

        assert fault.where == f"{DOWN}.weight[7, 30]"
        assert (fault.expected, fault.found) == ("finite codes", "1 fp8 codes that are no number (NaN)")

    def test_scales_of_zero_are_allowed_and_counted(self, tmp_path: Path):
        """A scale of zero makes a whole row or group zero, whatever its codes are; this is legitimate."""

        def write(stored: dict[str, Tensor]) -> None:
            stored[f"{Q}.weight_scale"][3, 1] = 0
            stored[f"{DOWN}.weight_scale"][:2] = 0

        write_checkpoint(tmp_path / "source", scheme="int8-g32", edit=write)
        convert_checkpoint(tmp_path / "source", tmp_path / "out")

        report = verify_checkpoint(tmp_path / "source", tmp_path / "out")

        assert report.good
        assert report.zero_scales == 1 + 2 * 4


class TestConversion:
    def test_a_faithful_conversion_is_good_and_every_value_was_compared(self, pair: tuple[Built, Path]):
        built, out = pair

        report = verify_checkpoint(built.directory, out)

        assert report.good
        assert report.faults == ()
        assert {check.name for check in report.checks} == {
            *built.dense,
            *(f"{MLP}.{name}_proj.input_scale" for name in ("gate", "up")),
            *(f"{ATTENTION}.{letter}_proj.{letter}_scale" for letter in "kv"),
        }
        kinds = {check.name: check.kind for check in report.checks}
        assert (kinds[f"{Q}.weight"], kinds[f"{DOWN}.weight"], kinds[f"{Q}.bias"]) == ("native", "dequantized", "plain")
        assert report.worst("native").comparison.error <= 1e-6
        assert report.worst("dequantized").comparison.error == report.worst("plain").comparison.error == 0

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_conversions_of_every_kind_are_good(self, pair: tuple[Built, Path], tmp_path: Path, to: str, dtype: str):
        built, _ = pair
        convert_checkpoint(built.directory, tmp_path / "other", to=to, dtype=dtype, max_shard_bytes=50_000)

        assert verify_checkpoint(built.directory, tmp_path / "other").good

    @pytest.mark.parametrize(("row", "nibble"), [(10, 0x01), (11, 0x10), (11, 0x80)])
    def test_a_flipped_nibble_is_found_in_its_row_and_block(self, pair: tuple[Built, Path], row: int, nibble: int):
        def flip(stored: dict[str, Tensor]) -> None:
            stored[f"{O}.weight"][5, 77] ^= nibble

        report = damaged(pair, flip)

        comparison = report.worst("native").comparison
        assert comparison.position == (row, 77)
        assert comparison.want == float(pair[0].dense[f"{O}.weight"][row, 77])
        assert comparison.got != comparison.want
        assert only_fault(report).where == f"{O}.weight, row {row}, columns 0-127"
        assert only_fault(report).found.endswith("the worst of 1 elements")

    def test_swapped_scales_are_found(self, pair: tuple[Built, Path]):
        def swap(stored: dict[str, Tensor]) -> None:
            scale = stored[f"{Q}.weight_scale"]
            scale[[20, 40], 1] = scale[[40, 20], 1]

        report = damaged(pair, swap)

        row, column = report.worst("native").comparison.position
        assert row in {20, 40}
        assert column >= 64
        assert f"{Q}.weight, row {row}" in only_fault(report).where

    @pytest.mark.parametrize(
        "lost",
        [
            f"{Q}.weight",
            f"{O}.weight_scale",
            f"{O}.pre_quant_scale",
            f"{Q}.bias",
            f"{GATE}.weight_scale",
            f"{GATE}.input_scale",
            f"{K}.k_scale",
            f"{DOWN}.weight",
            "model.norm.weight",
            "lm_head.weight",
        ],
    )
    def test_a_lost_tensor_is_named(self, pair: tuple[Built, Path], lost: str):
        report = damaged(pair, lambda stored: stored.pop(lost))

        assert any(lost.removesuffix(".weight_scale") in fault.where for fault in report.faults)
        assert any("no such tensor" in fault.found or "no weight_scale" in fault.found for fault in report.faults)

    @pytest.mark.parametrize(
        "name", ["model.layers.1.mlp.up_proj.weight", f"{Q}.weight_zero", f"{DOWN}.weight_scale", "extra"]
    )
    def test_a_surplus_tensor_is_named(self, pair: tuple[Built, Path], name: str):
        report = damaged(pair, lambda stored: stored.update({name: torch.ones(1)}))

        assert any(name in fault.where for fault in report.faults)

    def test_a_wrong_pre_quant_scale_is_a_wrong_weight(self, pair: tuple[Built, Path]):
        def double(stored: dict[str, Tensor]) -> None:
            stored[f"{O}.pre_quant_scale"][100] = 2

        report = damaged(pair, double)

        comparison = report.worst("native").comparison
        assert comparison.position[1] == 100
        assert comparison.got == 2 * comparison.want

    def test_a_pre_quant_scale_that_no_engine_reads_is_named(self, pair: tuple[Built, Path]):
        """A fused Linear ignores `pre_quant_scale`, so its effect would be lost."""
        report = damaged(pair, lambda stored: stored.update({f"{Q}.pre_quant_scale": torch.ones(128).bfloat16()}))

        assert only_fault(report).where == f"{Q}.pre_quant_scale"

    @pytest.mark.parametrize("name", [f"{GATE}.weight", f"{Q}.weight_scale"])
    def test_a_nan_value_is_the_worst(self, pair: tuple[Built, Path], name: str):
        def write(stored: dict[str, Tensor]) -> None:
            if stored[name].dtype is torch.float8_e4m3fn:
                stored[name].view(torch.uint8)[9, 70] = 0x7F
            else:
                stored[name][9, 1] = float("nan")

        report = damaged(pair, write)

        worst = report.worst("native")
        assert worst.name == name.replace("_scale", "")
        assert worst.comparison.position[0] == 9
        assert worst.comparison.position[1] >= 64
        assert worst.comparison.error == float("inf")
        assert "nan" in only_fault(report).found
        assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["good"] is False

    @pytest.mark.parametrize("name", [f"{DOWN}.weight", f"{Q}.bias", "model.norm.weight", "model.embed_tokens.weight"])
    def test_the_last_bit_of_a_plain_value_counts(self, pair: tuple[Built, Path], name: str):
        def step(stored: dict[str, Tensor]) -> None:
            stored[name].view(torch.int16).view(-1)[-1] ^= 1

        report = damaged(pair, step)

        kind = "dequantized" if name.startswith(DOWN) else "plain"
        assert report.worst(kind).name == name
        assert report.worst(kind).comparison.differing == 1
        assert report.worst(kind).comparison.position == tuple(size - 1 for size in pair[0].dense[name].shape)

    @pytest.mark.parametrize("name", [f"{K}.k_scale", f"{GATE}.input_scale"])
    def test_a_wrong_activation_scale_is_found(self, pair: tuple[Built, Path], name: str):
        assert only_fault(damaged(pair, lambda stored: stored[name].mul_(1.01))).where.startswith(name)


class TestConfiguration:
    """hf_quant_config.json says how the tensors are read, so a mistake in it makes weights wrong."""

    @staticmethod
    def with_changed_config(pair: tuple[Built, Path], change: Callable[[dict[str, Any]], object]) -> VerificationReport:
        built, out = pair
        path = out / "hf_quant_config.json"
        document = json.loads(path.read_text())
        change(document["quantization"])
        path.write_text(json.dumps(document))
        report = verify_checkpoint(built.directory, out)
        assert not report.good
        return report

    def test_a_quantized_module_that_is_excluded(self, pair: tuple[Built, Path]):
        report = self.with_changed_config(pair, lambda quantization: quantization["exclude_modules"].append(O))

        faults = {fault.where: fault for fault in report.faults}
        assert "since hf_quant_config.json gives it no mode" in faults[f"{O}.weight"].expected
        assert faults[f"{O}.weight"].found == "torch.uint8 [64, 128]"

    def test_a_plain_module_that_is_given_a_mode(self, pair: tuple[Built, Path]):
        def add(quantization: dict[str, Any]) -> None:
            quantization["quantized_layers"]["lm_head"] = {"quant_algo": "FP8"}
            quantization["exclude_modules"].remove("lm_head")

        report = self.with_changed_config(pair, add)

        assert {fault.where.partition(".")[0] for fault in report.faults} == {"lm_head"}

    def test_an_empty_exclude_list(self, tmp_path: Path):
        built = write_checkpoint(tmp_path / "source", config=tiny_config(layers=1), scheme="int4-g64")
        convert_checkpoint(built.directory, tmp_path / "out")

        report = self.with_changed_config(
            (built, tmp_path / "out"), lambda quantization: quantization.update(exclude_modules=[])
        )

        assert {fault.where.partition(".")[0] for fault in report.faults} == {"lm_head"}

    def test_another_group_size(self, pair: tuple[Built, Path]):
        report = self.with_changed_config(
            pair, lambda quantization: quantization["quantized_layers"][O].update(group_size=128)
        )

        assert only_fault(report).where == f"{O}.weight_scale"
        assert "group_size 128" in only_fault(report).expected

    def test_another_algorithm(self, pair: tuple[Built, Path]):
        report = self.with_changed_config(
            pair, lambda quantization: quantization["quantized_layers"][O].update(quant_algo="W4A16")
        )

        of_mode = [fault.where for fault in report.faults if not fault.where.startswith(O)]
        assert len(of_mode) < len(report.faults), "the weights don't fit the mode"
        assert all(f"hf_quant_config.json: quantization.quantized_layers.{O}" in where for where in of_mode)

    def test_no_configuration_at_all(self, pair: tuple[Built, Path]):
        built, out = pair
        (out / "hf_quant_config.json").unlink()

        report = verify_checkpoint(built.directory, out)

        assert {f"{name}.weight" for name in (Q, K, O, GATE)} <= {fault.where for fault in report.faults}


def test_another_checkpoint_is_not_the_source(pair: tuple[Built, Path], tmp_path: Path) -> None:
    _, out = pair
    other = write_checkpoint(tmp_path / "other", config=pair[0].config, scheme=MIXED, kv=True, seed=1)

    report = verify_checkpoint(other.directory, out)

    assert len([check for check in report.checks if not check.comparison.good]) == len(report.checks)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_conversion_that_cannot_be_read_is_raised(pair: tuple[Built, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(CatalogError):
        verify_checkpoint(pair[0].directory, tmp_path / name)


def test_the_json_document_holds_every_check(pair: tuple[Built, Path]) -> None:
    built, out = pair

    document = json.loads(json.dumps(verify_checkpoint(built.directory, out).to_dict(), allow_nan=False))

    assert document["good"] is True
    assert (document["directory"], document["converted"]) == (str(built.directory), str(out))
    assert {check["kind"] for check in document["checks"]} == {"native", "dequantized", "plain"}
    assert document["checks"][0].keys() == {"name", "kind", "good", "error", "differing", "position", "got", "want"}
