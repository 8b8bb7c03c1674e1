"""Llama 4 and Gemma 4, whose experts are stacks: converted, verified, computed, and on the double each rank's tensors.

Every Linear, every expert and every other parameter holds the slice of the stored values that the class computes with,
from a directory that was converted for stock, and loaded by this package.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from engine_fixtures import BINDINGS
from installed_transformers import in_dtype
from rank_slices import differs, experts_of, held_weight, rows_of_rank
from stacked_models import STACKED, as_saved, write_stacked

import trtllm_ct
from trtllm_ct import verify_checkpoint
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from builders import Built
    from torch import Tensor

# The models are built as transformers 5 builds them.
pytestmark = [pytest.mark.usefixtures("sidecar_cache"), pytest.mark.reference, pytest.mark.newest_transformers]

LLAMA, GEMMA, SHARED, UNIFIED = STACKED
SCHEMES = ("fp8-channel-token", "int4-g128", "fp8-block", "nvfp4")
# Several modes; and experts in stacks, with one mode and many plain Linears.
MIXED = {"o_proj": "int8-channel", "down_proj": "fp8-tensor-static", "gate_proj": "nvfp4", "up_proj": "nvfp4"}
STACKS = {"q_proj": "nvfp4", "k_proj": "nvfp4", "v_proj": "nvfp4", "o_proj": "nvfp4"}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
TOKENS = torch.arange(2, 22)[None]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """Return each checkpoint, which is written once."""
    written: dict[tuple[str, str], Built] = {}
    several: Mapping[str, Mapping[str, str]] = {"mixed": MIXED, "stacks": STACKS}

    def get(name: str, scheme: str) -> Built:
        if (name, scheme) not in written:
            directory = tmp_path_factory.mktemp("stored") / "in"
            directory.mkdir()
            written[name, scheme] = write_stacked(directory, name, several.get(scheme, scheme))
        return written[name, scheme]

    return get


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text: Mapping[str, Any] = config.get("text_config", config)
    return text


def stored_name(name: str) -> str:
    """The name in a text-only model of a module of the engine."""
    return name.replace(".moe.router", ".router").replace(".moe.experts", ".experts")


def parts_of(name: str, dense: Mapping[str, Tensor]) -> list[str]:
    """The stored Linears whose rows one of the engine has; keys are values where nothing else is stored."""
    around, _, leaf = stored_name(name).rpartition(".")
    parts = [f"{around}.{part}".lstrip(".") for part in FUSED.get(leaf, (leaf,))]
    if leaf == "qkv_proj" and f"{around}.k_proj.weight" not in dense:
        return parts[:1]
    if f"{around}.v_proj.weight" not in dense:
        parts = [f"{around}.k_proj" if part.endswith(".v_proj") else part for part in parts]
    return parts


def slice_of(name: str, module: Any, built: Built) -> Tensor:
    """What a Linear of the engine should hold on this rank."""
    if name == "lm_head" and text_of(built.config)["tie_word_embeddings"]:
        name = "model.embed_tokens"
    parts = [built.dense[f"{part}.weight"] for part in parts_of(name, built.dense)]
    if module.tp_size > 1 and module.tp_mode == "column":
        norm = built.dense.get(f"{name.rpartition('.')[0]}.k_norm.weight")
        size = text_of(built.config)["head_dim"] if norm is None else len(norm)
        return rows_of_rank(parts, module, len(parts[1]) // size if len(parts) == 3 else 1)
    whole = torch.cat(parts)
    return whole.chunk(module.tp_size, dim=1)[module.tp_rank] if module.tp_mode == "row" else whole


def of_others(name: str, module: Any, built: Built, ranks: tuple[int, int]) -> Iterator[tuple[str, bool]]:
    """Yield the bare parameters and buffers of a module; tables are divided by rows."""
    for local, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is None:
            continue
        key = stored_name(f"{name}.{local}")
        key = key if key in built.dense else key.replace("moe.per_expert_scale", "router.per_expert_scale")
        exact = built.dense[key]
        if type(module).__name__ == "Embedding":
            exact = exact.chunk(ranks[0])[ranks[1]]
        yield key, differs(tensor.float(), exact)


def compared(model: Any, built: Built) -> dict[str, bool]:
    """Return every stored tensor that a rank holds, and whether it is something else than its slice."""
    found: dict[str, bool] = {}
    mapping = model.model_config.mapping
    for name, module in model.named_modules():
        if hasattr(module, "quant_method") and hasattr(module, "tp_mode"):
            wrong = differs(held_weight(module), slice_of(name, module, built))
            found |= {f"{part}.weight": wrong for part in parts_of(name, built.dense)}
        elif hasattr(module, "expert_ids"):
            parts = experts_of(stored_name(name.removesuffix(".backend")), module, built.dense)
            found |= {f"{key}.weight": wrong for key, wrong in parts}
        else:
            found |= of_others(name, module, built, (mapping.tp_size, mapping.tp_rank))
    return found


def check_ranks(built: Built, out: Path, generation: str, tensor: int) -> None:
    release = engine_double.RELEASE_OF[generation]
    convert_checkpoint(built.directory, out, engine=release, parallel=Parallel(tensor=tensor))
    more = {"skip_tokenizer_init": True, "tensor_parallel_size": tensor}
    tied = {"lm_head.weight"} if text_of(built.config)["tie_word_embeddings"] else set()
    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        for directory, stock in ((out, True), (built.directory, False)):
            with engine.LLM(model=str(directory), **more) if stock else trtllm_ct.LLM(directory, **more) as llm:
                assert len(llm.models) == tensor
                for whole in llm.models:
                    found = compared(getattr(whole, "llm", whole), built)
                    assert {name for name, wrong in found.items() if wrong} == set()
                    assert built.dense.keys() - found.keys() == set()
                    assert found.keys() - built.dense.keys() <= tied


@pytest.mark.pairs
@pytest.mark.parametrize(
    ("scheme", "tensor"),
    [
        *((scheme, tensor) for scheme in SCHEMES for tensor in (1, 2, 4)),
        ("mixed", 2),
        ("stacks", 4),
        ("int4-channel", 4),
    ],
)
@pytest.mark.parametrize("name", STACKED)
def test_each_rank_holds_its_slices(
    stored: Callable[..., Built], tmp_path: Path, name: str, scheme: str, tensor: int
) -> None:
    check_ranks(stored(name, scheme), tmp_path / "out", "newest", tensor)


@pytest.mark.parametrize("generation", ["old", "mid"])
@pytest.mark.parametrize("scheme", ["fp8-channel-token", "nvfp4", "stacks"])
def test_older_releases_hold_llama_4_too(
    stored: Callable[..., Built], tmp_path: Path, scheme: str, generation: str
) -> None:
    check_ranks(stored(LLAMA, scheme), tmp_path / "out", generation, 2)


def plain_logits(name: str, built: Built) -> Tensor:
    """Logits of transformers' own model of the exact weights, in float32."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    directory = built.directory / "exact"
    directory.mkdir(exist_ok=True)
    config = {key: value for key, value in text_of(built.config).items() if key != "quantization_config"}
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    exact = {key: value.float().contiguous() for key, value in as_saved(name, built.dense).items()}
    save_file(exact, directory / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory, **in_dtype(torch.float32))
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


@pytest.mark.values
@pytest.mark.parametrize("scheme", [*SCHEMES, "mixed", "stacks"])
@pytest.mark.parametrize("name", STACKED)
def test_conversions_are_verified_and_give_the_logits_of_the_exact_weights(
    stored: Callable[..., Built], tmp_path: Path, name: str, scheme: str
) -> None:
    from trtllm_ct.reference.engine import load_model

    built = stored(name, scheme)
    want = plain_logits(name, built)
    for to in ("modelopt", "dense"):
        out = tmp_path / to
        convert_checkpoint(built.directory, out, to=to, engine="stock-1.3", dtype="float32")
        assert verify_checkpoint(built.directory, out).good
        assert_near(load_model(out, dtype=torch.float32, quantize_activations=False), want)
    assert_near(load_model(built.directory, dtype=torch.float32, quantize_activations=False), want)


def assert_near(model: Any, want: Tensor) -> None:
    with torch.no_grad():
        got = model(TOKENS).logits
    assert float((got - want).abs().max() / want.std()) < 1e-4
