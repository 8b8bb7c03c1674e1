"""`LLM` on a machine without TensorRT-LLM; `test_llm_on_double.py` tests it with the engine double."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite_config, tiny_config, write_checkpoint
from hub_cache import HubCache

import trtllm_ct
from trtllm_ct import LLM, SamplingParams
from trtllm_ct.base.errors import DetectionError, MissingDependencyError, UsageError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.calibration import write_calibration

if TYPE_CHECKING:
    from trtllm_ct.reference.requests import RequestOutput

pytestmark = pytest.mark.reference

DEMO = Path(trtllm_ct.__file__).parent / "cli" / "demo_data"
PROMPT = "The import statement"


def text_of(llm: Any, **params: Any) -> str:
    result: RequestOutput = llm.generate(PROMPT, SamplingParams(**{"max_tokens": 12, **params}))
    return result.outputs[0].text


def test_the_five_lines_of_the_readme_run() -> None:
    llm = LLM(model=DEMO, tensor_parallel_size=2)

    for out in llm.generate([PROMPT], SamplingParams(max_tokens=12)):
        assert out.prompt == PROMPT
        assert out.outputs[0].text == "\nis semantically equivalent"
        assert len(out.outputs[0].token_ids) == 12
        assert out.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(("engine", "level"), [("auto", logging.WARNING), ("reference", logging.INFO)])
def test_the_log_says_which_engine_runs_and_why(caplog: pytest.LogCaptureFixture, engine: Any, level: int) -> None:
    """It is a warning if the user didn't choose the reference engine, which is a thousand times slower."""
    caplog.set_level(logging.INFO, "trtllm_ct")

    LLM(DEMO, engine=engine, tensor_parallel_size=2, kv_cache_config=None, dtype="bfloat16")

    why = "TensorRT-LLM is not installed here" if engine == "auto" else "engine='reference'"
    line = f"The CPU reference engine runs {DEMO}: {why}; it ignores tensor_parallel_size, kv_cache_config"
    assert (line, level) in [(record.getMessage(), record.levelno) for record in caplog.records]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"requantize": "experts=fp8-block"}, "requantize"),
        ({"strict": True, "dense_o_proj": True}, "dense_o_proj, strict"),
        ({"requantize": {"linears": "fp8"}, "strict": False}, "requantize"),
        ({"requantize": "experts=w4a8-awq", "calibration": "scales"}, "requantize, calibration"),
    ],
)
def test_the_log_says_that_stored_weights_are_computed_whatever_a_conversion_would_do(
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_calibration("scales", {"model.layers.0.self_attn.q_proj": 0.5})

    llm = LLM(DEMO, tensor_parallel_size=2, **options)

    why = f"it ignores tensor_parallel_size; it computes the stored weights, so it ignores {named}"
    assert caplog.messages == [f"The CPU reference engine runs {DEMO}: TensorRT-LLM is not installed here; {why}"]
    assert text_of(llm) == text_of(LLM(DEMO))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"requantize": "bogus"}, "experts=FORM"),
        ({"requantize": 5}, "experts=FORM"),
        ({"calibration": "/none"}, "a form that reads scales of inputs"),
        ({"requantize": "experts=fp8", "calibration": "/none"}, "a form that reads scales of inputs"),
        ({"requantize": "experts=w4a8-awq", "calibration": "/none"}, "a safetensors file"),
        ({"requantize": "experts=w4a8-awq", "calibration": 5}, "calibration: expected a path"),
    ],
)
def test_options_of_a_conversion_are_checked_although_they_are_ignored(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        LLM(DEMO, engine="reference", **options)


def test_the_log_says_that_a_sidecar_stands_for_the_stored_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRTLLM_CT_CACHE", str(tmp_path / "cache"))
    prepared = trtllm_ct.prepare(DEMO, requantize="linears=fp8", dense_o_proj=True)

    LLM(prepared)

    assert caplog.messages[-1] == (
        f"{prepared} was prepared from {DEMO}; it computes the stored weights, so it ignores dense_o_proj, requantize "
        "of the preparation"
    )


def test_sampling_params_are_those_of_the_engine_that_runs() -> None:
    from trtllm_ct.reference import requests

    assert SamplingParams is requests.SamplingParams


def test_drawing_is_seeded() -> None:
    llm = LLM(DEMO)

    hot = [text_of(llm, temperature=2.0, seed=seed) for seed in (1, 1, 2)]

    assert hot[0] == hot[1] != hot[2]
    assert text_of(llm, top_k=50, top_p=0.0) == text_of(llm)
    assert text_of(llm, stop="equivalent") == "\nis semantically "


def test_a_converted_directory_gives_the_same_text(tmp_path: Path) -> None:
    convert_checkpoint(DEMO, tmp_path / "out")

    assert text_of(LLM(tmp_path / "out")) == text_of(LLM(DEMO))


def test_plain_weights_run_too(tmp_path: Path) -> None:
    convert_checkpoint(DEMO, tmp_path / "dense", to="dense")

    assert text_of(LLM(str(tmp_path / "dense"))) == text_of(LLM(DEMO))


def test_a_sidecar_loads_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_CT_CACHE", str(tmp_path / "cache"))

    assert text_of(LLM(trtllm_ct.prepare(DEMO))) == text_of(LLM(DEMO))


def test_a_repository_id_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = HubCache(tmp_path / "hub", monkeypatch)
    hub.add("org/demo", DEMO)
    hub.add("org/demo", write_checkpoint(tmp_path / "v2", tokenizer=True).directory, commit="f" * 40, branch="v2")

    assert text_of(LLM("org/demo")) == text_of(LLM(DEMO))
    assert LLM("org/demo", revision="v2").generate([5, 6]).outputs
    with pytest.raises(DetectionError, match="org/missing"):
        LLM("org/missing")


def test_another_quantization_method_is_named(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "gptq").directory
    rewrite_config(directory, lambda config: config.update(quantization_config={"quant_method": "gptq"}))

    with pytest.raises(DetectionError, match="GPTQ"):
        LLM(directory)


def test_a_missing_tensorrt_llm_raises() -> None:
    with pytest.raises(MissingDependencyError, match="engine='reference'"):
        LLM(DEMO, engine="tensorrt_llm")


def test_an_unknown_engine_raises() -> None:
    with pytest.raises(UsageError, match="auto or tensorrt_llm or reference"):
        LLM(DEMO, engine="vllm")  # type: ignore[arg-type]


def test_dense_weights_of_another_dtype(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, config=tiny_config(dtype="float16"), scheme="dense", tokenizer=True)
    rewrite_config(made.directory, lambda config: config.pop("quantization_config"))

    assert LLM(made.directory).generate([7, 8], SamplingParams(max_tokens=3)).outputs[0].token_ids
