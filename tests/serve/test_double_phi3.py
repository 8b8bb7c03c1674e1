"""Phi-3 on every generation of the double: its class cuts stored fused weights by rows, and has to get what it cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import engine_double
import pytest
from builders import SCHEMES, tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from plain_model import deviation, plain_logits

import trtllm_ct
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("sidecar_cache")]

ENGINES = {"old": "stock-1.0", "mid": "stock-1.2", "newest": "stock-1.3"}
TOKENS = list(range(5, 25))
ROUNDED = 2e-2
LOADED = [name for name in SCHEMES if not name.endswith("asym") and name != "int4-g256"]
CUT = ("fp8-tensor-static", "fp8-channel-token", "nvfp4", "mxfp8")


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize(("scheme", "ranks"), [*((scheme, 1) for scheme in LOADED), *((scheme, 2) for scheme in CUT)])
def test_every_scheme_loads_with_the_right_values(tmp_path: Path, scheme: str, ranks: int, generation: str) -> None:
    config = tiny_config("Phi3ForCausalLM", hidden=128, pad_token_id=0)
    built = write_checkpoint(tmp_path / "in", config=config, scheme=scheme)
    want = plain_logits(config, built.dense, TOKENS)
    parallel = Parallel(tensor=ranks)
    convert_checkpoint(tmp_path / "in", tmp_path / "out", engine=ENGINES[generation], parallel=parallel)
    more = {"skip_tokenizer_init": True, "tensor_parallel_size": ranks}

    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        with engine.LLM(model=str(tmp_path / "out"), **more) as llm:
            stock = deviation(llm.logits(TOKENS), want)
        with trtllm_ct.LLM(tmp_path / "in", engine="tensorrt_llm", **more) as llm:
            loaded = deviation(llm.logits(TOKENS), want)

    assert max(stock, loaded) < ROUNDED
