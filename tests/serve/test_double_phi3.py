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
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("sidecar_cache")]

ENGINES = {"old": "stock-1.0", "mid": "stock-1.2", "newest": "stock-1.3"}
TOKENS = list(range(5, 25))
ROUNDED = 2e-2
LOADED = [name for name in SCHEMES if not name.endswith("asym") and name != "int4-g256"]
CUT = ("fp8-tensor-static", "fp8-channel-token", "nvfp4", "mxfp8")


@pytest.mark.values
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


MIXTURES = {
    "static queries": {"qkv_proj": "fp8-tensor-static", "o_proj": "fp8-channel-token", "down_proj": "int8-channel"},
    "plain queries": {"gate_up_proj": "nvfp4", "o_proj": "fp8-channel-token", "down_proj": "int4-g64"},
    "all differ": {"qkv_proj": "nvfp4", "o_proj": "int4-g64", "gate_up_proj": "fp8-tensor-static"},
}


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_built_as_planned(tmp_path: Path, name: str, generation: str, kv: bool) -> None:
    """The engine looks for the mode of `qkv_proj` under `q_proj`, and gives it to attention too."""
    config = tiny_config("Phi3ForCausalLM", hidden=128, pad_token_id=0)
    built = write_checkpoint(tmp_path / "in", config=config, scheme=MIXTURES[name], kv=kv)
    want = plain_logits(config, built.dense, TOKENS)
    report = convert_checkpoint(tmp_path / "in", tmp_path / "out", engine=ENGINES[generation])

    with (
        engine_double.installed(generation, importers=[BINDINGS]) as engine,
        engine.LLM(model=str(tmp_path / "out"), skip_tokenizer_init=True) as llm,
    ):
        attention = llm.models[0].get_submodule("model.layers.0.self_attn")
        fixed = attention.quantizes_output and attention.o_proj.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN"
        stock = deviation(llm.logits(TOKENS), want)

    assert stock < ROUNDED
    assert verify_checkpoint(tmp_path / "in", tmp_path / "out").good
    assert any("fixed scale" in warning for warning in report.warnings) is fixed
    assert fixed is (kv and name == "static queries")
