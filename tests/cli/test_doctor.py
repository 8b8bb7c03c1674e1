"""`trtllm-ct doctor`: which engine a machine has, and how it would serve a checkpoint."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
from builders import rewrite, tiny_config, write_checkpoint
from command_line import Done, run_cli
from engine_fixtures import BINDINGS
from fresh_python import run_python

from trtllm_ct import prepare
from trtllm_ct.base.packages import PACKAGES
from trtllm_ct.cli.doctor import diagnose
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.serve.patch_switch import NO_PATCH
from trtllm_ct.serve.sidecar import SIDECAR_FILE, Sidecar

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = tiny_config(hidden=128, intermediate=256)
MIXED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "int4-g64-asym"),
    "o_proj": "int4-g64",
    "down_proj": "int8-g32",
}
ROW_WISE = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "fp8-channel-token") | {"down_proj": "int8-channel"}


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_CT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(NO_PATCH, raising=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    return write_checkpoint(directory, config=CONFIG, scheme=MIXED, kv=True).directory


def lines(done: Done) -> list[str]:
    return [line.strip() for line in done.out.splitlines()]


def missing(done: Done) -> dict[str, str]:
    """Return the faults about missing packages and features, by their `where`."""
    return {fault["where"]: fault["found"] for fault in done.document["missing"]}


# The machine.


def test_without_tensorrt_llm_it_says_what_runs_instead_and_how_to_get_it() -> None:
    done = run_cli("doctor")

    assert (done.code, done.err) == (0, "")
    assert lines(done)[0] == "LLM runs the CPU reference engine: TensorRT-LLM is not installed"
    assert "capability set: reference (trtllm_ct.reference.linear_layouts: LAYOUTS)" in lines(done)
    at = lines(done).index("tensorrt_llm")
    assert lines(done)[at - 1 : at + 4] == [
        "Missing (1):",
        "tensorrt_llm",
        "expected the package: it serves on a GPU; without it the CPU reference engine runs",
        "found    not installed",
        PACKAGES["tensorrt_llm"].remedy,
    ]


def test_without_tensorrt_llm_there_are_no_features() -> None:
    document = run_cli("doctor", "--json").document

    assert (document["kind"], document["engine"], document["features"]) == ("doctor", "reference", None)
    assert document["served"] is None
    assert {"W4A16_AWQ", "W4A16_GPTQ", "MXFP8"} <= set(document["capabilities"]["linear"])


@pytest.mark.parametrize(
    ("package", "remedy"),
    [
        ("transformers", "pip install 'trtllm-ct[reference]'"),
        ("huggingface_hub", "pip install 'huggingface_hub>=0.36.2'"),
        ("numba", "pip install numba"),
    ],
)
@pytest.mark.parametrize("with_engine", [False, True])
def test_missing_packages_are_named_with_their_purpose(
    monkeypatch: pytest.MonkeyPatch, package: str, remedy: str, with_engine: bool
) -> None:
    if with_engine:
        with engine_double.installed("newest", importers=[BINDINGS]):
            monkeypatch.setitem(sys.modules, package, None)
            done = run_cli("doctor", "--json")
    else:
        monkeypatch.setitem(sys.modules, package, None)
        done = run_cli("doctor", "--json")

    assert done.code == 0
    (fault,) = [fault for fault in done.document["missing"] if fault["where"] == package]
    assert fault["found"] == "not installed"
    assert fault["expected"].startswith("the package: ")
    assert fault["remedy"] == f"Run: {remedy}"


SEEN = {
    "old": {"force_dynamic_quantization": False, "mapping_argument": False, "version": "1.1.0"},
    "mid": {"force_dynamic_quantization": False, "mapping_argument": True, "version": "1.2.1"},
    "newest": {"force_dynamic_quantization": True, "mapping_argument": True, "version": "1.4.0rc1"},
}


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_features_and_modes_of_the_installed_release(generation: str) -> None:
    name, features = engine_double.RELEASE_OF[generation], SEEN[generation]
    with engine_double.installed(generation, importers=[BINDINGS]):
        document = run_cli("doctor", "--json").document
        shown = lines(run_cli("doctor"))

    assert (document["engine"], document["why"]) == ("tensorrt_llm", "it is installed")
    assert features.items() <= document["features"].items()
    assert document["features"]["engine"] == document["capabilities"]["name"] == name
    assert "W4A16_GPTQ" in document["capabilities"]["linear"], "with the Linear that this package puts in"
    assert ("MXFP8" in document["capabilities"]["linear"]) is (generation == "newest")
    assert shown[0] == "LLM runs TensorRT-LLM: it is installed"
    for feature, value in document["features"].items():
        words = {True: "yes", False: "no", None: "unknown"}
        assert f"{feature}: {value if isinstance(value, str) else words[value]}" in shown
    assert f"Linears: {', '.join(document['capabilities']['linear'])}" in shown
    assert f"routed experts: {', '.join(document['capabilities']['experts'])}" in shown


def test_a_release_without_a_version_is_unknown(newest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(newest, "__version__")

    done = run_cli("doctor")

    assert done.code == 0
    assert "version: unknown" in lines(done)
    assert run_cli("doctor", "--json").document["features"]["version"] is None


def test_modes_of_later_releases_are_reported_as_missing(old: Any) -> None:
    assert missing(run_cli("doctor", "--json")) == {
        "capability set stock-1.0": "no MXFP8, W4A16_NVFP4, W4A8_AWQ, W4A8_MXFP4_MXFP8",
        "LLM(force_dynamic_quantization=...)": "none that attention honours in this TensorRT-LLM",
    }


def test_the_newest_release_lacks_nothing(newest: Any) -> None:
    done = run_cli("doctor")

    assert missing(run_cli("doctor", "--json")) == {}
    assert "Missing" not in done.out


def test_the_switch_is_named_if_it_disables_a_mode(engine: Any, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NO_PATCH, "1")

    document = run_cli("doctor", source, "--json").document

    (fault,) = [fault for fault in document["missing"] if fault["where"] == "W4A16_GPTQ"]
    assert f"{NO_PATCH} is set" in fault["found"]
    assert f"unset {NO_PATCH}" in fault["remedy"]
    assert "W4A16_GPTQ" not in document["capabilities"]["linear"]
    assert document["served"]["native"] == {"W4A16_AWQ g64": 2}


def test_the_greeting_of_tensorrt_llm_does_not_break_the_document(
    newest: Any, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    """TensorRT-LLM prints its version to stdout when it is imported."""
    monkeypatch.setattr("trtllm_ct.cli.doctor.require_engine", lambda: print("[TensorRT-LLM] version: 1.4"))

    done = run_cli("doctor", source, "--json")

    assert done.document["engine"] == "tensorrt_llm"
    assert done.err == "[TensorRT-LLM] version: 1.4\n"


def test_a_broken_installation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example is an installation without its CUDA libraries; using the reference engine instead would hide it."""
    (tmp_path / "tensorrt_llm").mkdir()
    (tmp_path / "tensorrt_llm" / "__init__.py").write_text("raise ImportError('libnvinfer.so.10: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, BINDINGS, raising=False)

    done = run_cli("doctor")

    assert (done.code, done.out) == (2, "")
    assert "found    ImportError: libnvinfer.so.10: cannot open" in done.err
    assert PACKAGES["tensorrt_llm"].remedy in done.err_words
    document = run_cli("doctor", "--json").document
    assert (document["kind"], document["error"]) == ("error", "MissingDependencyError")


# A checkpoint on the machine.


@pytest.mark.parametrize("sizes", [Parallel(), Parallel(tensor=2), Parallel(tensor=4), Parallel(pipeline=2)], ids=str)
def test_it_reports_the_plan_of_prepare(engine: Any, source: Path, sizes: Parallel) -> None:
    """Modes and reasons are compared for each module; the prepared directory is what the engine loads."""
    served = run_cli("doctor", source, "--tp", sizes.tensor, "--pp", sizes.pipeline, "--json").document["served"]

    made = prepare(source, tensor_parallel_size=sizes.tensor, pipeline_parallel_size=sizes.pipeline)
    modes = Sidecar.open(made).modes
    counts: dict[str, int] = {}
    reasons: dict[str, list[str]] = {}
    for module, (mode, reason) in modes.items():
        if mode == "dequantized":
            reasons.setdefault(reason, []).append(module)
        else:
            counts[mode] = counts.get(mode, 0) + 1
    assert (served["native"], served["dequantized"]) == (counts, reasons)
    assert served["parallel"] == sizes.to_dict()
    assert served["kv_cache"] == "FP8"
    told = json.loads((made / "hf_quant_config.json").read_text())["quantization"]
    assert told["kv_cache_quant_algo"] == served["kv_cache"]


def test_modes_reasons_and_bytes_in_words(newest: Any, source: Path) -> None:
    done = run_cli("doctor", source)

    shown = lines(done)
    assert (done.code, done.err) == (0, "")
    assert f"{source} is a compressed-tensors checkpoint" in shown
    assert "served natively: 6 x W4A16_GPTQ g64, 2 x W4A16_AWQ g64" in shown
    assert "dequantized 2 modules: W8A16 holds no scale per group" in shown
    assert "KV cache: FP8" in shown
    assert any(line.startswith("bytes: ") and line.endswith("kB over all ranks") for line in shown)
    assert shown[-1] == "Warnings: none" or shown[-2] == "Warnings: none"


def test_sizes_are_shown_with_sizes_that_would_keep_a_mode(newest: Any, source: Path) -> None:
    done = run_cli("doctor", source, "--tp", 4, "--pp", 2)

    assert f"{source} is a compressed-tensors checkpoint (tensor 4, pipeline 2)" in lines(done)
    (line,) = [line for line in lines(done) if "W4A16_AWQ at tensor parallel 4" in line]
    assert line == (
        "dequantized 2 modules: W4A16_AWQ at tensor parallel 4: each rank's 32 columns are no multiple of 64; "
        "sizes 1, 2 work"
    )


def test_the_document_is_the_diagnosis(engine: Any, source: Path) -> None:
    done = run_cli("doctor", source, "--tp", 2, "--json")

    found = diagnose(source, parallel=Parallel(tensor=2)).to_dict()
    assert done.document == {"schema": 1, "kind": "doctor", **json.loads(json.dumps(found))}
    assert found["served"]["delivered_bytes"] == Sidecar.open(prepare(source)).plan.delivered_bytes


def test_without_an_engine_it_is_planned_for_the_reference(source: Path) -> None:
    served = run_cli("doctor", source, "--json").document["served"]

    assert served["native"] == {"W4A16_GPTQ g64": 6, "W4A16_AWQ g64": 2}
    assert (served["traps"], served["problems"]) == ([], [])


def test_a_model_with_nothing_native_says_so(old: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", config=CONFIG, scheme="mxfp8", kv=True)

    done = run_cli("doctor", tmp_path / "model")

    assert done.code == 0
    assert "served natively: none" in lines(done)
    assert "KV cache: not quantized" in lines(done)
    assert any("KvCacheConfig(dtype='fp8')" in line for line in lines(done))


@pytest.mark.parametrize(
    ("generation", "kv", "trapped"), [("old", True, True), ("old", False, False), ("newest", True, False)]
)
def test_a_trap_is_reported_and_the_model_is_served(tmp_path: Path, generation: str, kv: bool, trapped: bool) -> None:
    """Attention quantizes its output with a scale of 1 if the cache is quantized, and no option prevents it."""
    write_checkpoint(tmp_path / "model", config=CONFIG, scheme=ROW_WISE, kv=kv)

    with engine_double.installed(generation, importers=[BINDINGS]):
        done = run_cli("doctor", tmp_path / "model")
        traps = run_cli("doctor", tmp_path / "model", "--json").document["served"]["traps"]

    assert done.code == 0
    assert ("Traps (1):" in lines(done)) is trapped
    assert [fault["where"] for fault in traps] == ["2 o_proj behind a quantized KV cache"] * trapped
    assert all("dense_o_proj=True" in fault["remedy"] for fault in traps)


@pytest.mark.parametrize("with_engine", [False, True])
def test_every_problem_is_listed_and_the_code_is_1(tmp_path: Path, with_engine: bool) -> None:
    directory = write_checkpoint(tmp_path / "model", config=CONFIG, scheme="int4-g64").directory
    rewrite(directory, lambda tensors: [tensors.pop(f"model.layers.{i}.mlp.up_proj.weight_scale") for i in range(2)])

    if with_engine:
        with engine_double.installed("newest", importers=[BINDINGS]):
            done, document = run_cli("doctor", directory), run_cli("doctor", directory, "--json")
    else:
        done, document = run_cli("doctor", directory), run_cli("doctor", directory, "--json")

    assert (done.code, document.code) == (1, 1)
    wheres = [fault["where"] for fault in document.document["served"]["problems"]]
    assert wheres == [f"model.layers.{layer}.mlp.up_proj.weight_scale" for layer in range(2)]
    assert document.document["served"]["native"] == {}
    assert document.document["served"]["delivered_bytes"] is None
    assert "Problems (2):" in lines(done)
    assert "model.layers.{0..1}.mlp.up_proj.weight_scale" in lines(done), "folded"
    assert "untouched" not in done.out


def test_sizes_that_the_model_cannot_be_cut_by_are_problems(newest: Any, source: Path) -> None:
    done = run_cli("doctor", source, "--tp", 3)

    assert done.code == 1
    assert "config.json: num_attention_heads" in lines(done)
    assert "Tensor-parallel sizes that work: 1, 2, 4." in lines(done)


def test_files_for_trtllm_build_are_not_passed_to_the_engine(engine: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", config=tiny_config(hidden=128, intermediate=128), scheme="int4-g64")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", to="engine")

    done = run_cli("doctor", tmp_path / "out")

    assert done.code == 1
    assert "an engine-build checkpoint" in done.out
    assert "trtllm-build" in done.out
    assert "untouched" not in done.out


@pytest.mark.parametrize("kind", ["modelopt", "dense"])
def test_other_checkpoints_are_passed_to_the_engine(engine: Any, source: Path, tmp_path: Path, kind: str) -> None:
    convert_checkpoint(source, tmp_path / "out", to=kind)

    done = run_cli("doctor", tmp_path / "out")

    assert done.code == 0
    assert "it goes to the engine untouched" in lines(done)
    served = run_cli("doctor", tmp_path / "out", "--json").document["served"]
    assert (served["native"], served["dequantized"], served["problems"]) == ({}, {}, [])


def test_a_converted_directory_whose_modes_the_gpu_lacks_is_a_problem(
    engine: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(source, tmp_path / "out", engine="stock-1.0", sm=90)
    assert run_cli("doctor", tmp_path / "out").code == 0
    monkeypatch.setattr(f"{BINDINGS}._sm_of_gpu", lambda: 120)

    done = run_cli("doctor", tmp_path / "out")

    assert done.code == 1
    assert "W4A16_AWQ has no Linear on SM120" in done.out
    assert "it was converted for SM90" in done.out


@pytest.mark.parametrize("with_engine", [False, True])
def test_a_prepared_directory_is_served_like_its_source(source: Path, with_engine: bool) -> None:
    """`LLM` accepts a prepared directory as well, with the options that it was prepared with."""
    if with_engine:
        with engine_double.installed("newest", importers=[BINDINGS]):
            made = prepare(source, tensor_parallel_size=2, dense_o_proj=True)
            served = run_cli("doctor", made, "--tp", 2, "--json").document["served"]
        native = [mode for mode, _ in Sidecar.open(made).modes.values() if mode != "dequantized"]
        assert served["native"] == {mode: native.count(mode) for mode in native}
    else:
        made = prepare(source)
        served = run_cli("doctor", made, "--json").document["served"]
        assert served["native"] == run_cli("doctor", source, "--json").document["served"]["native"]
    assert "sidecar" in served["description"]


def test_a_prepared_directory_is_planned_for_the_requested_sizes(newest: Any, source: Path) -> None:
    """`LLM` prepares the checkpoint again for other sizes."""
    made = prepare(source, tensor_parallel_size=2)

    for tensor in (2, 4):
        served = [run_cli("doctor", place, "--tp", tensor, "--json").document["served"] for place in (made, source)]
        assert served[0]["native"] == served[1]["native"]
        assert served[0]["dequantized"] == served[1]["dequantized"]


def test_a_prepared_directory_whose_source_is_gone_is_a_problem(newest: Any, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", config=CONFIG, scheme="int4-g64").directory
    made = prepare(directory)
    directory.rename(tmp_path / "elsewhere")

    done = run_cli("doctor", made)

    assert done.code == 1
    assert str(directory) in lines(done)
    assert "found    no such directory on this node" in lines(done)


def test_a_damaged_prepared_directory_is_a_problem(newest: Any, source: Path) -> None:
    made = prepare(source)
    (made / SIDECAR_FILE).write_text("{}")

    done = run_cli("doctor", made)

    assert done.code == 1
    assert SIDECAR_FILE in done.out + done.err
    assert "prepare again" in done.out + done.err


# Usage.


def test_a_path_that_is_not_a_directory_is_an_error_with_code_1(tmp_path: Path) -> None:
    done = run_cli("doctor", tmp_path / "nowhere")

    assert (done.code, done.out) == (1, "")
    assert "found    no such directory" in done.err
    document = run_cli("doctor", tmp_path / "nowhere", "--json").document
    assert (document["kind"], document["error"]) == ("error", "DetectionError")


@pytest.mark.parametrize(
    "options",
    [("--tp", 0), ("--pp", 0), ("--ep", 0), ("--tp", -2), ("--ep", 2), ("--tp", 3, "--ep", 2), ("--tp", "two")],
    ids=str,
)
def test_invalid_sizes_are_usage_errors(source: Path, options: tuple[Any, ...]) -> None:
    done = run_cli("doctor", source, *options)

    assert (done.code, done.out) == (2, "")
    assert len(done.err.split()) > 5


def test_the_machine_is_examined_without_torch() -> None:
    """The command answers quickly, also on machines where torch is broken."""
    code = """
        import sys
        from trtllm_ct.cli.doctor import diagnose
        diagnose()
        print([name for name in ("torch", "transformers") if name in sys.modules])
    """

    assert run_python(code).stdout == "[]\n"


def test_nothing_is_prepared(newest: Any, source: Path, tmp_path: Path) -> None:
    run_cli("doctor", source, "--tp", 2)

    assert not (tmp_path / "cache").exists()
