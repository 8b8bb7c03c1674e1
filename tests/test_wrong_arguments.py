"""What is wrong in a call of a public function is a `UsageError` that names the argument, before anything is done."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from builders import write_checkpoint

import trtllm_ct
from trtllm_ct.base.errors import UsageError
from trtllm_ct.plan.options import PlanOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "to": (None, 3, ["modelopt"]),
    "engine": (1.2, None, ("1.2",)),
    "sm": ("90", 90.0, True, [90]),
    "untested": (None, "yes", 1),
    "additive_zeros": (None, "no", 0),
    "dtype": (16, "int8", object, ["auto"]),
    "strict": (None, "false", 1),
    "parallel": (2, None, {"tensor": 2}, "2"),
    "dense_o_proj": (None, "yes", 1),
    "requantize": (3, [3], b"all=fp8", {"all": 3}, True),
    "kv_cache": ("bogus", "fp8", "INT8", 8, ["FP8"]),
    "tp": (2,),
}
PLANNING: dict[str, Callable[..., Any]] = {
    "inspect_checkpoint": trtllm_ct.inspect_checkpoint,
    "plan_checkpoint": trtllm_ct.plan_checkpoint,
    "convert_checkpoint": lambda directory, **asked: trtllm_ct.convert_checkpoint(
        directory, directory.parent / "out", **asked
    ),
    "Checkpoint.plan": lambda directory, **asked: trtllm_ct.open_checkpoint(directory).plan(**asked),
}
PATHS: dict[str, Callable[[Any], Any]] = {
    "inspect_checkpoint": trtllm_ct.inspect_checkpoint,
    "verify_checkpoint": trtllm_ct.verify_checkpoint,
    "open_checkpoint": trtllm_ct.open_checkpoint,
    "plan_checkpoint": trtllm_ct.plan_checkpoint,
    "load_weights": lambda path: trtllm_ct.CompressedTensorsWeightLoader().load_weights(path),
    "load_weights stored": lambda path: trtllm_ct.CompressedTensorsWeightLoader().load_weights(path, layout="stored"),
    "load": lambda path: trtllm_ct.CompressedTensorsConfigLoader().load(path),
    "detect": lambda path: trtllm_ct.FormatDetector().detect(path),
    "read": lambda path: trtllm_ct.CompressedTensorsConfigReader().read(path),
    "from_directory": trtllm_ct.Catalog.from_directory,
    "convert_checkpoint": lambda path: trtllm_ct.convert_checkpoint(path, "out"),
    "convert_checkpoint out": lambda path: trtllm_ct.convert_checkpoint("in", path),
    "prepare": trtllm_ct.prepare,
    "LLM": lambda path: trtllm_ct.LLM(path, engine="reference"),
    "load_compressed": trtllm_ct.load_compressed,
    "save_compressed": lambda path: trtllm_ct.save_compressed({}, path),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "in").directory


def refused(call: Callable[[], Any], name: str) -> None:
    """The call is refused by name, and the message shows no part of the program."""
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert re.search(rf"\b{name}\b", message.replace("--", "").replace("-", "_")), message
    assert "__init__" not in message


def test_there_are_wrong_values_of_each_option() -> None:
    assert WRONG_OPTIONS.keys() == PlanOptions.__dataclass_fields__.keys() | {"tp"}


@pytest.mark.parametrize("function", PLANNING)
@pytest.mark.parametrize(("name", "value"), [(name, one) for name, wrong in WRONG_OPTIONS.items() for one in wrong])
def test_an_option_of_planning_is_refused(source: Path, function: str, name: str, value: Any) -> None:
    refused(lambda: PLANNING[function](source, **{name: value}), name)

    assert [path.name for path in source.parent.iterdir()] == ["in"]


def test_all_wrong_options_are_named_at_once(source: Path) -> None:
    with pytest.raises(UsageError) as caught:
        trtllm_ct.inspect_checkpoint(source, engine=1.2, sm="90", strict="no")  # type: ignore[arg-type]

    assert [fault.where for fault in caught.value.faults] == ["engine", "sm", "strict"]


@pytest.mark.parametrize("function", PATHS)
@pytest.mark.parametrize("value", [None, 3, b"in", ["in"]])
def test_what_is_no_path_is_refused(function: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"^(directory|checkpoint_dir|model_dir|model|path|out): expected a path"):
        PATHS[function](value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_shard_bytes", "5GB"),
        ("max_shard_bytes", None),
        ("max_shard_bytes", 5e9),
        ("keep", "12GB"),
        ("keep", 0.5),
        ("workers", "2"),
        ("workers", 1.5),
        ("workers", True),
        ("executor", 3),
        ("executor", None),
        ("overwrite", "yes"),
        ("force", None),
        ("sync", 0),
        ("on_start", 3),
        ("on_download", "bar"),
        ("overwite", True),
    ],
)
def test_an_argument_of_a_conversion_is_refused(source: Path, name: str, value: Any) -> None:
    refused(lambda: PLANNING["convert_checkpoint"](source, **{name: value}), name)

    assert [path.name for path in source.parent.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tensor_parallel_size", "2"),
        ("pipeline_parallel_size", 1.5),
        ("moe_expert_parallel_size", "2"),
        ("enable_attention_dp", "yes"),
        ("dtype", 3),
        ("dense_o_proj", "yes"),
        ("requantize", 3),
        ("calibration", 3),
        ("kv_cache_dtype", "x"),
        ("kv_cache_dtype", 3),
        ("strict", "yes"),
    ],
)
def test_an_argument_of_prepare_is_refused(source: Path, name: str, value: Any) -> None:
    more = {"requantize": "experts=w4a8-awq"} if name == "calibration" else {}

    refused(lambda: trtllm_ct.prepare(source, **{name: value}, **more), name)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("converted", lambda source: trtllm_ct.verify_checkpoint(source, 3)),
        ("requantize", lambda source: trtllm_ct.verify_checkpoint(source, source, requantize=3)),
        ("requantize", lambda source: trtllm_ct.verify_checkpoint(source, source, requantize="all=q4")),
        ("directory", lambda _source: trtllm_ct.diagnose(3)),
        ("parallel", lambda source: trtllm_ct.diagnose(source, parallel=2)),
        ("options", lambda source: _make_plan(source, "modelopt")),
        ("options", lambda source: _make_plan(source, None)),
        ("config", lambda _source: trtllm_ct.Model.from_config(None)),
        ("config", lambda _source: trtllm_ct.FormatDetector().detect_config("in")),
        ("config", lambda _source: trtllm_ct.to_quant_config({"config_groups": {}})),
        ("target", lambda source: trtllm_ct.to_quant_config(trtllm_ct.open_checkpoint(source).config, "gguf")),
        ("tensors", lambda source: trtllm_ct.save_compressed([], source / "new")),
        ("model", lambda source: trtllm_ct.save_compressed_model({}, source / "new")),
        ("compression_config", lambda source: trtllm_ct.load_compressed(source, "sparse-bitmask")),
    ],
)
def test_an_argument_of_another_function_is_refused(source: Path, name: str, call: Callable[[Path], Any]) -> None:
    refused(lambda: call(source), name)


def _make_plan(source: Path, options: Any) -> Any:
    checkpoint = trtllm_ct.open_checkpoint(source)
    return trtllm_ct.make_plan(checkpoint.config, checkpoint.catalog, checkpoint.model, options)


def test_requantization_is_verified_by_its_words(source: Path, tmp_path: Path) -> None:
    """As it is asked for in `convert_checkpoint`."""
    trtllm_ct.convert_checkpoint(source, tmp_path / "out")

    report = trtllm_ct.verify_checkpoint(source, tmp_path / "out", requantize="linears=fp8")

    assert "requantize" in str(report.faults)


def test_a_catalog_is_read_from_a_path_as_text(source: Path) -> None:
    assert trtllm_ct.Catalog.from_directory(str(source)).files  # type: ignore[arg-type]
