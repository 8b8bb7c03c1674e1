"""Every entry of the table of producers: when it applies, its warning, and when it does not apply."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import rewrite_config, write_checkpoint
from stored_weights import described
from tiny_models import tiny_config
from torch import Tensor

from trtllm_ct import CompressedTensorsWeightLoader, verify_checkpoint
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import PayloadError
from trtllm_ct.base.schemes import QuantArgs, Strategy, TensorSpec
from trtllm_ct.config.quantization_config import QuantizationConfig
from trtllm_ct.formats.packed_int import PACKED_INT
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan.plan import ModulePlan
from trtllm_ct.plan.producers import PRODUCERS, Producer, header_warnings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS = {producer.name: producer for producer in PRODUCERS}
DOWN = "model.layers.0.mlp.down_proj"


def set_version(directory: Path, version: str | None) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"].pop("version")
        if version is not None:
            config["quantization_config"]["version"] = version

    rewrite_config(directory, change)


def said(directory: Path, version: str | None) -> set[str]:
    """The names of the rows that the plan of a checkpoint quotes."""
    set_version(directory, version)
    warnings = plan_checkpoint(directory).warnings
    assert all(any(warning.startswith(row.warning) for row in PRODUCERS) for warning in warnings)
    return {name for name, row in ROWS.items() if any(warning.startswith(row.warning) for warning in warnings)}


class TestTable:
    def test_entries_have_a_unique_name_a_source_and_one_test(self):
        assert len(ROWS) == len(PRODUCERS)
        for row in PRODUCERS:
            assert row.source
            assert (row.in_headers is None) != (row.in_values is None)

    @pytest.mark.parametrize("name", ROWS)
    def test_a_warning_says_what_to_do_or_how_the_values_are_read(self, name: str):
        words = ("quantize the model again", "calibrate", "set version", "are read", "convert the model again")
        assert any(word in ROWS[name].warning for word in words)
        assert not ROWS[name].warning.endswith(".")

    @pytest.mark.parametrize(
        ("release", "early", "late"),
        [
            ((0, 9, 3), False, False),
            ((0, 9, 4), True, False),
            ((0, 10, 2), True, False),
            ((0, 11, 0), False, True),
            ((0, 20, 0), False, True),
            ((), True, False),
        ],
    )
    def test_a_checkpoint_without_a_version_counts_as_one_of_the_releases_that_lose_it(
        self, release: tuple[int, ...], early: bool, late: bool
    ):
        first = Producer(name="", warning="", source="", since=(0, 9, 4), fixed=(0, 11, 0))
        second = Producer(name="", warning="", source="", since=(0, 11, 0))
        assert (first.covers(release), second.covers(release)) == (early, late)

    @pytest.mark.parametrize(
        ("version", "origin", "release"),
        [
            ("0.13.0", "config.json: quantization_config", (0, 13, 0)),
            ("0.13.1.a20260110", "config.json: quantization_config", (0, 13, 1)),
            ("0.18", "config.json: quantization_config", (0, 18, 0)),
            ("unreleased", "config.json: quantization_config", ()),
            (None, "config.json: quantization_config", ()),
            (None, "config.json: compression_config", (0, 6, 0)),
        ],
    )
    def test_the_release_of_a_configuration(self, version: str | None, origin: str, release: tuple[int, ...]):
        assert QuantizationConfig(groups=(), version=version, origin=origin).release == release


class TestHeaders:
    @pytest.mark.parametrize(
        ("version", "wrong"),
        [("0.13.0", True), ("0.13.1.a20251222", True), ("0.14.0", False), ("0.20.0", False), (None, False)],
    )
    def test_mxfp4_exponents(self, tmp_path: Path, version: str | None, wrong: bool):
        write_checkpoint(tmp_path, config=tiny_config(layers=1), scheme="mxfp4a16")
        assert said(tmp_path, version) == ({"mxfp4-exponents"} if wrong else set())

    def test_the_warning_has_the_number_of_modules(self, tmp_path: Path):
        write_checkpoint(
            tmp_path, config=tiny_config(layers=1), scheme={"o_proj": "mxfp4a16", "down_proj": "fp8-block"}
        )
        set_version(tmp_path, "0.13.0")
        (warning,) = plan_checkpoint(tmp_path, sm=90).warnings
        assert warning.endswith("quantize the model again with 0.14 or later (1 module)")

    @pytest.mark.parametrize(("version", "wrong"), [("0.12.2", True), ("0.11.0", False), ("0.13.0", False)])
    def test_kv_scales_release(self, tmp_path: Path, version: str, wrong: bool):
        write_checkpoint(tmp_path, scheme="int8-channel", kv=True)
        assert said(tmp_path, version) == ({"kv-scales-release"} if wrong else set())

    @pytest.mark.parametrize(
        ("architecture", "version", "wrong"),
        [
            ("Qwen2ForCausalLM", "0.15.0", True),
            ("Qwen2ForCausalLM", "0.16.0", False),
            ("LlamaForCausalLM", "0.15.0", False),
        ],
    )
    def test_rotated_bias(self, tmp_path: Path, architecture: str, version: str, wrong: bool):
        """SpinQuant's R2, which turns the heads of v_proj."""
        write_checkpoint(tmp_path, config=tiny_config(architecture), scheme="int8-channel")
        place = {"targets": ["re:.*v_proj$"], "location": "weight_output"}
        transforms = {"config_groups": {"R2": {"type": "hadamard", "head_dim": 16, "apply": [place]}}}
        rewrite_config(tmp_path, lambda config: config["quantization_config"].update(transform_config=transforms))
        assert said(tmp_path, version) == ({"rotated-bias"} if wrong else set())

    @pytest.mark.parametrize(
        ("architecture", "recipe", "version", "wrong"),
        [
            ("Qwen3MoeForCausalLM", "SmoothQuantModifier", "0.12.2", True),
            ("Qwen3MoeForCausalLM", "SmoothQuantModifier", None, True),
            ("Qwen3MoeForCausalLM", "SmoothQuantModifier", "0.13.0", False),
            ("Qwen3MoeForCausalLM", "GPTQModifier", "0.12.2", False),
            ("Qwen3ForCausalLM", "SmoothQuantModifier", "0.12.2", False),
            ("MixtralForCausalLM", "SmoothQuantModifier", "0.12.2", False),
        ],
    )
    def test_first_expert_smoothed(
        self, tmp_path: Path, architecture: str, recipe: str, version: str | None, wrong: bool
    ):
        write_checkpoint(tmp_path, config=tiny_config(architecture, layers=1), scheme="w8a8")
        (tmp_path / "recipe.yaml").write_text(f"{recipe}:\n  smoothing_strength: 0.8\n")
        assert said(tmp_path, version) == ({"first-expert-smoothed"} if wrong else set())

    @pytest.mark.parametrize(
        ("architecture", "recipe", "version", "wrong"),
        [
            ("Gemma2ForCausalLM", "AWQModifier", "0.15.0", True),
            ("Gemma3ForCausalLM", "SmoothQuantModifier", None, True),
            ("Gemma2ForCausalLM", "AWQModifier", "0.16.0", False),
            ("Gemma2ForCausalLM", "GPTQModifier", "0.15.0", False),
            ("LlamaForCausalLM", "AWQModifier", "0.15.0", False),
        ],
    )
    def test_offset_norms_smoothed(
        self, tmp_path: Path, architecture: str, recipe: str, version: str | None, wrong: bool
    ):
        write_checkpoint(tmp_path, config=tiny_config(architecture, layers=1), scheme="int8-channel")
        (tmp_path / "recipe.yaml").write_text(f"{recipe}:\n  ignore: [lm_head]\n")
        assert said(tmp_path, version) == ({"offset-norms-smoothed"} if wrong else set())

    @pytest.mark.parametrize("version", ["0.10.2", None])
    def test_surplus_zero_points(self, tmp_path: Path, version: str | None):
        def pad(stored: dict[str, Tensor]) -> None:
            name = f"{DOWN}.weight_zero_point"
            stored[name] = torch.cat([stored[name], torch.ones_like(stored[name])], 1)

        write_checkpoint(tmp_path, scheme="int4-g32-asym", edit=pad)
        assert said(tmp_path, version) == {"surplus-zero-points"}

    @pytest.mark.parametrize(
        ("version", "strategy", "plain"),
        [("0.7.1", "group", True), ("0.7.1", "channel", False), ("0.8.0", "group", False), ("0.14.0", "group", False)],
    )
    def test_marlin_24_plain_scales(self, tmp_path: Path, version: str, strategy: str, plain: bool):
        rows, columns, groups = 64, 128, 4 if strategy == "group" else 1

        def arrange(stored: dict[str, Tensor]) -> None:
            for local in ("weight_packed", "weight_scale", "weight_shape"):
                del stored[f"{DOWN}.{local}"]
            stored[f"{DOWN}.weight_packed"] = torch.zeros(columns // 32, 2 * rows, dtype=torch.int32)
            stored[f"{DOWN}.scale_packed"] = torch.ones(groups, rows, dtype=torch.float16)
            stored[f"{DOWN}.meta"] = torch.zeros(columns // 32, 2 * rows, dtype=torch.int16)

        scheme = {"down_proj": "int4-g32" if strategy == "group" else "int4-channel"}
        write_checkpoint(tmp_path, config=tiny_config(layers=1), scheme=scheme, edit=arrange)
        rewrite_config(tmp_path, lambda config: _declare(config, "marlin-24"))
        assert said(tmp_path, version) == ({"marlin-24-plain-scales"} if plain else set())

    @pytest.mark.parametrize(
        ("bits", "columns", "version", "unclear"),
        [
            (3, 40, None, True),
            (3, 40, "0.17.1", False),
            (3, 64, None, False),
            (6, 12, None, True),
            (4, 40, None, False),
        ],
    )
    def test_undated_odd_widths(self, bits: int, columns: int, version: str | None, unclear: bool):
        words = -(-columns * bits // 32)
        stored = {
            "weight_packed": TensorSpec(DType.I32, (8, words)),
            "weight_scale": TensorSpec(DType.BF16, (8, 1)),
        }
        weight = described(PACKED_INT, QuantArgs(num_bits=bits, strategy=Strategy.CHANNEL), stored, (8, columns))
        module = ModulePlan(name="lin", class_name="Linear", views={}, weight=weight)
        config = QuantizationConfig(groups=(), version=version)

        warnings = header_warnings(config, "LlamaForCausalLM", [module])

        assert warnings == ((f"{ROWS['undated-odd-widths'].warning} (1 module)",) if unclear else ())


class TestValues:
    """A warning is logged once at load; verification counts the modules."""

    @pytest.fixture
    def logged(self, caplog: pytest.LogCaptureFixture) -> Callable[[Path], list[str]]:
        def load(directory: Path) -> list[str]:
            with caplog.at_level(logging.WARNING):
                CompressedTensorsWeightLoader(decompressor="native").load_weights(directory)
            return [record.getMessage() for record in caplog.records]

        return load

    def test_kv_scales_of_zero(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        """They are refused, and the warning says who wrote them."""

        def forget(stored: dict[str, Tensor]) -> None:
            for name, tensor in stored.items():
                if name.endswith(("k_scale", "v_scale")):
                    tensor.zero_()

        write_checkpoint(tmp_path, scheme="int8-channel", kv=True, edit=forget)

        report = verify_checkpoint(tmp_path)
        with pytest.raises(PayloadError, match="a finite scale that is positive"):
            CompressedTensorsWeightLoader(decompressor="native").load_weights(tmp_path)

        assert report.warnings == (f"{ROWS['kv-scales-of-zero'].warning} (2 modules)",)
        assert len(report.faults) == 4
        (record,) = caplog.records
        assert record.getMessage() == f"model.layers.0.self_attn: {ROWS['kv-scales-of-zero'].warning}"

    @pytest.mark.parametrize("scheme", ["int4-g32-asym", "int4-channel-asym", "int8-plain-channel-asym"])
    def test_unsigned_zero_points(self, tmp_path: Path, scheme: str, logged: Callable[[Path], list[str]]):
        """Unsigned 8 of four bits, offset once more, is the lowest signed number."""

        def offset_again(stored: dict[str, Tensor]) -> None:
            for name, tensor in stored.items():
                if name.endswith("weight_zero_point"):
                    tensor.fill_(-128 if tensor.dtype == torch.int8 else 0)

        write_checkpoint(tmp_path, config=tiny_config(layers=1), scheme=scheme, edit=offset_again)

        row = ROWS["unsigned-zero-points"]
        assert logged(tmp_path) == [f"model.layers.0.self_attn.q_proj: {row.warning}"]
        report = verify_checkpoint(tmp_path)
        assert (report.good, report.warnings) == (True, (f"{row.warning} (7 modules)",))

    def test_inverted_global_scale(self, tmp_path: Path, logged: Callable[[Path], list[str]]):
        def invert(stored: dict[str, Tensor]) -> None:
            stored[f"{DOWN}.weight_global_scale"].fill_(1 / 4096)

        write_checkpoint(tmp_path, config=tiny_config(layers=1), scheme="nvfp4a16", edit=invert)

        row = ROWS["inverted-global-scale"]
        assert logged(tmp_path) == [f"{DOWN}: {row.warning}"]
        assert verify_checkpoint(tmp_path).warnings == (f"{row.warning} (1 module)",)

    @pytest.mark.parametrize("scheme", ["int4-g32-asym", "int8-plain-channel-asym", "nvfp4", "fp8-tensor-static"])
    def test_ordinary_values_give_no_warning(self, tmp_path: Path, scheme: str, logged: Callable[[Path], list[str]]):
        write_checkpoint(tmp_path, scheme=scheme, kv=scheme in {"nvfp4", "fp8-tensor-static"})
        assert logged(tmp_path) == []
        assert verify_checkpoint(tmp_path).warnings == ()


def test_warnings_of_the_headers_are_logged_at_load_and_kept_by_verification(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, config=tiny_config(layers=1), scheme="mxfp4a16")
    set_version(tmp_path, "0.13.0")

    CompressedTensorsWeightLoader(decompressor="native").load_weights(tmp_path)

    warning = f"{ROWS['mxfp4-exponents'].warning} (7 modules)"
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: {warning}"]
    assert verify_checkpoint(tmp_path).to_dict()["warnings"] == [warning]


def _declare(config: dict[str, Any], name: str) -> None:
    config["quantization_config"]["format"] = name
    for group in config["quantization_config"]["config_groups"].values():
        group["format"] = name
