"""A quantized head keeps its codes on releases whose heads have its mode, and is plain on all others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine_double
import pytest
from builders import tiny_config, write_checkpoint
from engine_fixtures import BINDINGS

import trtllm_ct
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("sidecar_cache")

ENGINES = {"old": "stock-1.0", "mid": "stock-1.2", "newest": "stock-1.3"}
HEADS = {"fp8-tensor-static": "FP8", "nvfp4": "NVFP4", "nvfp4a16": "W4A16_NVFP4"}
TOKENS = (5, 17, 3, 42, 8, 66)
ROUNDED = 2**-6


def config(**more: Any) -> dict[str, Any]:
    return tiny_config(**{"hidden": 128, "vocab_size": 128, **more})


def logits(directory: Path, generation: str, *, stock: bool, **sizes: int) -> Any:
    with engine_double.installed(generation, sm=100, importers=[BINDINGS]) as engine:
        arguments: dict[str, Any] = {"skip_tokenizer_init": True, **sizes}
        made = engine.LLM(model=str(directory), **arguments) if stock else None
        with made or trtllm_ct.LLM(directory, engine="tensorrt_llm", **arguments) as llm:
            heads = [model.lm_head.quant_algo for model in llm.models if hasattr(model, "lm_head")]
            return llm.logits(TOKENS), set(heads)


@pytest.mark.pairs
@pytest.mark.parametrize("alone", [True, False], ids=["head only", "head and Linears"])
@pytest.mark.parametrize("stock", [True, False], ids=["stock", "loader"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("scheme", HEADS)
def test_a_quantized_head_is_right_in_every_generation(
    tmp_path: Path, scheme: str, generation: str, sizes: tuple[int, int], stock: bool, alone: bool
) -> None:
    linears = {} if alone else {"o_proj": scheme, "down_proj": scheme}
    source = write_checkpoint(tmp_path / "in", config=config(), scheme={"lm_head": scheme, **linears}).directory
    convert_checkpoint(source, tmp_path / "dense", to="dense")
    want, _ = logits(tmp_path / "dense", generation, stock=True)
    if stock:
        parallel = Parallel(tensor=sizes[0], pipeline=sizes[1])
        convert_checkpoint(source, tmp_path / "out", engine=ENGINES[generation], parallel=parallel)

    parallel_sizes = {"tensor_parallel_size": sizes[0], "pipeline_parallel_size": sizes[1]}
    got, heads = logits(tmp_path / ("out" if stock else "in"), generation, stock=stock, **parallel_sizes)

    assert (got - want).abs().max() / want.abs().max() < ROUNDED
    assert heads == {HEADS[scheme] if generation == "newest" else None}
