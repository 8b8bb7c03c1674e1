"""The stages in order: the result of each, and the errors that each raises."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, rewrite_config, tiny_config, write_checkpoint
from on_tensors import stream_delivered
from safetensors.torch import save_file

import trtllm_ct
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CatalogError, ConfigError, DetectionError, PayloadError, UsageError
from trtllm_ct.checkpoint.reader import TensorReader
from trtllm_ct.cli.doctor import diagnose
from trtllm_ct.config import detect
from trtllm_ct.config.detect import Detection, FormatDetector
from trtllm_ct.config.json_file import read_json_of
from trtllm_ct.engine.target import ENGINES, TARGETS, target_named
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
from trtllm_ct.pipeline.weight_mapper import CompressedTensorsWeightMapper
from trtllm_ct.plan.producers import ValueWatch
from trtllm_ct.reference import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trtllm_ct.checkpoint.source import Source
    from trtllm_ct.layouts.stored_array import StoredArray
    from trtllm_ct.plan.plan import ModulePlan


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return write_checkpoint(tmp_path_factory.mktemp("int4"), scheme="int4-g64", shards=3)


@pytest.mark.parametrize("as_type", [str, Path])
def test_opening_reads_no_tensor(built: Built, as_type: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorReader, "read", lambda *_: pytest.fail("a tensor was read"))

    checkpoint = open_checkpoint(as_type(built.directory))

    assert checkpoint.directory == built.directory
    assert checkpoint.detection.method == "compressed-tensors"
    assert checkpoint.config.groups[0].scheme.label() == "int4 group 64"
    assert set(checkpoint.catalog.tensors) == set(built.stored)
    assert checkpoint.model.name == "LlamaForCausalLM"
    assert checkpoint.hf_config == built.config


def test_a_byte_order_mark_in_config_json_is_accepted(tmp_path: Path) -> None:
    """Some editors write one."""
    write_checkpoint(tmp_path)
    config = tmp_path / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())

    assert open_checkpoint(tmp_path).model.layers == 2


def test_each_stage_refuses_with_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(DetectionError):
        open_checkpoint(tmp_path)
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CatalogError):
        open_checkpoint(tmp_path)
    rewrite_config(tmp_path, lambda config: config["quantization_config"].update(config_groups=3))
    with pytest.raises(ConfigError):
        open_checkpoint(tmp_path)


def test_mistral_weight_names_without_config_json_are_refused_by_name(tmp_path: Path) -> None:
    """params.json may hold a compressed-tensors block, but nothing that is read describes its model."""
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "params.json").write_text(
        '{"quantization": {"quant_method": "compressed-tensors", "config_groups": {}}}'
    )

    with pytest.raises(ConfigError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_plan_of_a_directory_is_the_plan_of_its_checkpoint(built: Built) -> None:
    checkpoint = open_checkpoint(built.directory)

    assert plan_checkpoint(built.directory) == checkpoint.plan() == checkpoint.plan("modelopt")
    assert plan_checkpoint(built.directory, "dense", dtype=DType.F16) == checkpoint.plan("dense", dtype=DType.F16)


@pytest.mark.usefixtures("sidecar_cache")
@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda source, _: trtllm_ct.inspect_checkpoint(source), id="inspect"),
        pytest.param(lambda source, _: trtllm_ct.verify_checkpoint(source), id="verify"),
        pytest.param(trtllm_ct.convert_checkpoint, id="convert"),
        pytest.param(lambda source, _: trtllm_ct.CompressedTensorsWeightLoader().load_weights(source), id="weights"),
        pytest.param(lambda source, _: trtllm_ct.CompressedTensorsConfigLoader().load(source), id="config"),
        pytest.param(lambda source, _: trtllm_ct.prepare(source), id="prepare"),
        pytest.param(lambda source, _: diagnose(source), id="diagnose"),
        pytest.param(lambda source, _: load_model(source), id="load-model", marks=pytest.mark.reference),
    ],
)
def test_a_directory_is_detected_once(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path, Path], object]
) -> None:
    """A second detection would read config.json again."""
    original = FormatDetector.detect
    detected: list[Path] = []
    files: list[str] = []

    def detect_and_count(self: FormatDetector, directory: str | Path | Source) -> Detection:
        detected.append(Path(getattr(directory, "folder", directory)))
        return original(self, directory)

    def read_and_count(source: Source, name: str) -> Mapping[str, Any]:
        files.append(name)
        return read_json_of(source, name)

    monkeypatch.setattr(FormatDetector, "detect", detect_and_count)
    monkeypatch.setattr(detect, "read_json_of", read_and_count)
    read(built.directory, tmp_path / "out")

    assert detected == [built.directory]
    assert files == ["config.json"]


def test_delivered_tensors_have_the_order_and_the_specs_of_the_plan(built: Built) -> None:
    checkpoint = open_checkpoint(built.directory)
    plan = checkpoint.plan()

    streamed = list(stream_delivered(plan, checkpoint.catalog))

    assert [module for module, _ in streamed] == list(plan.modules)
    delivered = {name: tensor for _, tensors in streamed for name, tensor in tensors.items()}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in delivered.items()} == {
        name: (spec.dtype.torch_dtype, spec.shape) for name, spec in plan.delivered_specs.items()
    }


def test_streaming_equals_mapping_in_memory(built: Built) -> None:
    """The mapper alone does for tensors in memory what the pipeline does for files."""
    checkpoint = open_checkpoint(built.directory)
    plan = checkpoint.plan()

    mapped = CompressedTensorsWeightMapper().map_weights(plan, built.stored)

    streamed = {name: tensor for _, part in stream_delivered(plan, checkpoint.catalog) for name, tensor in part.items()}
    assert mapped.keys() == streamed.keys()
    assert all(torch.equal(mapped[name], streamed[name]) for name in mapped)


class TestWorkers:
    @pytest.mark.parametrize("workers", [1, 2, 3, 8, 100])
    def test_any_number_of_workers_gives_the_same_tensors(self, built: Built, workers: int):
        checkpoint = open_checkpoint(built.directory)
        plan = checkpoint.plan()
        expected = CompressedTensorsWeightMapper().map_weights(plan, built.stored)

        streamed = list(stream_delivered(plan, checkpoint.catalog, workers=workers))

        assert [module for module, _ in streamed] == list(plan.modules)
        delivered = {name: tensor for _, part in streamed for name, tensor in part.items()}
        assert delivered.keys() == expected.keys()
        assert all(torch.equal(delivered[name], expected[name]) for name in expected)

    def test_a_plan_without_modules_yields_nothing(self, built: Built):
        checkpoint = open_checkpoint(built.directory)

        assert list(stream_delivered(replace(checkpoint.plan(), modules=()), checkpoint.catalog, workers=2)) == []

    @pytest.mark.parametrize(("workers", "ahead"), [(1, 0), (2, 2), (3, 4)])
    def test_no_more_modules_are_read_ahead_than_the_workers_need(self, built: Built, workers: int, ahead: int):
        checkpoint = open_checkpoint(built.directory)
        plan = checkpoint.plan()
        read: list[str] = []

        class Reader(TensorReader):
            def read(self, name: str, *run: int | None) -> StoredArray:
                read.append(name)
                return super().read(name, *run)

        modules = stream_delivered(plan, checkpoint.catalog, reader=Reader(checkpoint.catalog), workers=workers)
        for number, _ in enumerate(modules, start=1):
            begun = plan.modules[: number + ahead]
            assert read == [run.name for module in begun for run in module.runs]

    @pytest.mark.parametrize("workers", [1, 4])
    def test_the_first_fault_in_the_order_of_the_plan_is_raised(self, tmp_path: Path, workers: int):
        """Even if a later one is found sooner; modules before the fault are delivered."""
        built = write_checkpoint(tmp_path, scheme="int4-g64")
        plan = open_checkpoint(tmp_path).plan()
        modules = [module.name for module in plan.modules]
        quantized = [module.name for module in plan.modules if module.weight is not None]
        first, last = quantized[3], quantized[-1]
        scales = [f"{name}.weight_scale" for name in (first, last)]
        broken = {name: torch.full_like(built.stored[name], torch.nan) for name in scales}
        save_file(built.stored | broken, tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        names: list[str] = []

        def deliver() -> None:
            for module, _ in stream_delivered(checkpoint.plan(), checkpoint.catalog, workers=workers):
                names.append(module.name)

        with pytest.raises(PayloadError, match=re.escape(first)) as caught:
            deliver()
        assert last not in str(caught.value)
        assert names == modules[: modules.index(first)]

    def test_stopping_early_waits_only_for_running_conversions(self, built: Built):
        checkpoint = open_checkpoint(built.directory)
        modules = stream_delivered(checkpoint.plan(), checkpoint.catalog, workers=4)
        before = threading.active_count()

        next(modules)
        modules.close()

        assert threading.active_count() == before

    def test_a_warning_is_logged_once_for_the_first_module_of_the_plan(
        self, built: Built, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        """Even if a later module is converted first."""
        checkpoint = open_checkpoint(built.directory)
        plan = checkpoint.plan()
        one, other = [module.name for module in plan.modules if module.weight is not None][:2]
        other_looked = threading.Event()

        def look(_self: ValueWatch, module: ModulePlan, _stored: object) -> tuple[str, ...]:
            if module.name == one:
                other_looked.wait(timeout=20)
            elif module.name == other:
                other_looked.set()
            return ("odd values",) if module.name in {one, other} else ()

        monkeypatch.setattr(ValueWatch, "look", look)
        with caplog.at_level("WARNING"):
            list(stream_delivered(plan, checkpoint.catalog, workers=2))

        assert other_looked.is_set()
        assert [record.getMessage() for record in caplog.records] == [f"{one}: odd values"]


class TestTargets:
    @pytest.mark.parametrize("name", ["modelopt", "dense", "reference"])
    def test_each_target_is_found_by_its_name(self, name: str):
        assert target_named(name) == TARGETS[name]
        assert target_named(name).name == name

    def test_an_unknown_target_lists_the_known_ones(self, tmp_path: Path):
        write_checkpoint(tmp_path, config=tiny_config(layers=1))

        with pytest.raises(UsageError) as caught:
            plan_checkpoint(tmp_path, "onnx")

        (fault,) = caught.value.faults
        assert (fault.expected, fault.found) == (" or ".join(TARGETS), "'onnx'")

    def test_an_unknown_engine_lists_the_known_ones(self, tmp_path: Path):
        write_checkpoint(tmp_path, config=tiny_config(layers=1))

        with pytest.raises(UsageError) as caught:
            plan_checkpoint(tmp_path, engine="stock-0.9")

        (fault,) = caught.value.faults
        assert (fault.where, fault.found) == ("--engine", "'stock-0.9'")
        assert all(name in fault.expected for name in ENGINES)

    @pytest.mark.parametrize("engine", ENGINES)
    @pytest.mark.parametrize("expert", [False, True])
    def test_no_stock_release_has_a_linear_for_zero_points(self, engine: str, expert: bool):
        assert "W4A16_GPTQ" not in target_named("modelopt", engine).algos(expert=expert)
