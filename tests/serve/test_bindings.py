"""This package's loader in the engine, on all generations of releases: all schemes, several ranks, repeated loads."""

from __future__ import annotations

import json
from importlib import import_module
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
from builders import Built, tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from plain_model import deviation, plain_logits

from trtllm_ct import prepare

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CONFIG = tiny_config(hidden=128, intermediate=256)
WIDE = tiny_config(hidden=256, heads=4, intermediate=512)
EXPERTS = tiny_config("Qwen3MoeForCausalLM", hidden=128, intermediate=256, moe_intermediate_size=128)
TOKENS = list(range(5, 25))
MIXED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "int8-channel"),
    "o_proj": "int4-g64",
    **dict.fromkeys(("gate_proj", "up_proj"), "fp8-block"),
}
EXACT, ROUNDED = 2e-3, 2e-2
"""Bounds in standard deviations of the logits: for exact weights, and for weights rounded to the model's dtype."""
BOUNDS: dict[str, float] = {
    "int4-g64": EXACT,
    "int4-g128": EXACT,
    "int4-channel": EXACT,
    "int4-g64-asym": ROUNDED,
    "int4-g32": ROUNDED,
    "int8-channel": EXACT,
    "w8a8": EXACT,
    "fp8-channel-token": EXACT,
    "fp8-block": EXACT,
    "nvfp4": EXACT,
    "nvfp4a16": ROUNDED,
    "mxfp8": ROUNDED,
    "mixed": EXACT,
}

pytestmark = pytest.mark.usefixtures("sidecar_cache")


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return write_checkpoint(tmp_path / "model", config=CONFIG, scheme="int4-g64")


def loader(**arguments: Any) -> Any:
    return import_module(BINDINGS).CompressedTensorsCheckpointLoader(**arguments)


def logits_of(engine: Any, directory: Path, own: Any = None, *, draft: bool = False, **arguments: Any) -> Tensor:
    own = own or loader()
    with engine.LLM(model=str(directory), checkpoint_loader=own, skip_tokenizer_init=True, **arguments) as llm:
        logits: Tensor = llm.logits(TOKENS, draft=draft)
    return logits


def mapping(**parts: int) -> Any:
    return import_module("tensorrt_llm.mapping").Mapping(**parts)


# Loading.


@pytest.mark.reference
@pytest.mark.parametrize("scheme", BOUNDS)
def test_every_scheme_gives_the_logits_of_its_values(engine: Any, tmp_path: Path, scheme: str) -> None:
    # Additive zeros are up to eight quantization steps large; rounding them to bfloat16 alone would give 0.03.
    config = WIDE | ({"dtype": "float16"} if scheme.endswith("asym") else {})
    built = write_checkpoint(tmp_path / "model", config=config, scheme=MIXED if scheme == "mixed" else scheme)

    logits = logits_of(engine, prepare(built.directory))

    assert deviation(logits, plain_logits(built.config, built.dense, TOKENS)) < BOUNDS[scheme]


@pytest.mark.reference
@pytest.mark.parametrize("scheme", ["nvfp4", "fp8-block", "int8-channel", "mxfp4a16"])
def test_experts_too(engine: Any, tmp_path: Path, scheme: str) -> None:
    built = write_checkpoint(tmp_path / "model", config=EXPERTS, scheme=scheme)

    logits = logits_of(engine, prepare(built.directory))

    assert deviation(logits, plain_logits(built.config, built.dense, TOKENS)) < ROUNDED


@pytest.mark.reference
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2)])
def test_ranks_in_one_process(engine: Any, tmp_path: Path, sizes: tuple[int, int]) -> None:
    built = write_checkpoint(tmp_path / "model", config=WIDE, scheme="int4-g64")
    arguments = {"tensor_parallel_size": sizes[0], "pipeline_parallel_size": sizes[1]}

    logits = logits_of(engine, prepare(built.directory, **arguments), **arguments)

    assert deviation(logits, plain_logits(built.config, built.dense, TOKENS)) < EXACT


@pytest.mark.reference
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_two_spawned_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: str) -> None:
    """Workers get pickled arguments and few environment variables, and each one writes its report."""
    monkeypatch.setenv("TRTLLM_CT_REPORTS", str(tmp_path / "reports"))
    built = write_checkpoint(tmp_path / "model", config=WIDE, scheme="int4-g64")

    with engine_double.installed(generation, in_process=False, importers=[BINDINGS]) as engine:
        made = prepare(built.directory, tensor_parallel_size=2)
        logits = logits_of(engine, made, tensor_parallel_size=2)

    assert deviation(logits, plain_logits(built.config, built.dense, TOKENS)) < EXACT
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "reports").iterdir())]
    assert [(report["rank"], report["modes"]) for report in reports] == [
        (0, {"W4A16_AWQ g64": 14}),
        (1, {"W4A16_AWQ g64": 14}),
    ]
