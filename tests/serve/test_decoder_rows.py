"""Decoders whose row lists no modules: converted, verified, computed, and on the double each rank's tensors.

On one, two and four ranks every Linear, every expert and every other parameter holds the slice of the stored values
that the class computes with, from a directory that was converted for stock, and loaded by this package.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import fp8_weights, rewrite, rewrite_config
from decoder_models import DECODERS, SINCE, write_decoder
from engine_fixtures import BINDINGS
from installed_transformers import in_dtype
from rank_slices import differs, experts_of, held_weight, rows_of_rank

import trtllm_ct
from trtllm_ct import inspect_checkpoint, verify_checkpoint
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from builders import Built
    from torch import Tensor

pytestmark = [pytest.mark.usefixtures("sidecar_cache"), pytest.mark.reference]

SCHEMES = ("fp8-channel-token", "int4-g128", "fp8-block", "nvfp4")
OLDER = [
    (name, generation)
    for name, since in SINCE.items()
    for generation in engine_double.GENERATIONS[engine_double.GENERATIONS.index(since) : -1]
]
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "kv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
TOKENS = torch.arange(2, 14)[None]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """Return each checkpoint, which is written once."""
    written: dict[tuple[str, str], Built] = {}

    def get(name: str, scheme: str) -> Built:
        if (name, scheme) not in written:
            written[name, scheme] = write_decoder(tmp_path_factory.mktemp("stored") / "in", name, scheme)
        return written[name, scheme]

    return get


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text: Mapping[str, Any] = config.get("text_config", config)
    return text


def stored_name(name: str, model_type: str) -> str:
    """The name in the files of a module of the engine."""
    if model_type == "starcoder2":
        return name.replace("mlp.up_proj", "mlp.c_fc").replace("mlp.down_proj", "mlp.c_proj")
    if model_type == "nemotron_h":
        return name.replace("model.", "backbone.", 1).replace("embed_tokens", "embeddings")
    return name.replace("mlp.gate", "mlp.router.gate") if name.endswith("mlp.gate") and model_type == "afmoe" else name


def parts_of(name: str, generation: str, text: Mapping[str, Any]) -> list[str]:
    """The stored modules whose rows one Linear of the engine has, in order."""
    around, _, leaf = stored_name(name, text["model_type"]).rpartition(".")
    parts = FUSED.get(leaf, (leaf,))
    if leaf == "kv_a_proj_with_mqa" and generation == "mid":
        parts = (*parts, "indexer.wk")
    return [f"{around}.{part}".lstrip(".") for part in parts]


def interleaved(queries: Tensor, gate: Tensor, heads: int) -> Tensor:
    return torch.stack([part.unflatten(0, (heads, -1)) for part in (queries, gate)], dim=1).flatten(0, 2)


def of_mamba(weight: Tensor, module: Any, text: Mapping[str, Any], *, leaf: str) -> Tensor:
    """This rank's rows of z, x, B, C and dt, or of the last three's convolution."""
    inner = text["mamba_num_heads"] * text["mamba_head_dim"]
    groups = text["n_groups"] * text["ssm_state_size"]
    sizes = [inner, inner, groups, groups, text["mamba_num_heads"]]
    parts = weight.split(sizes if leaf == "in_proj" else sizes[1:4])
    return torch.cat([part.chunk(module.tp_size)[module.tp_rank] for part in parts])


def slices(name: str, module: Any, built: Built, generation: str, local: str) -> Tensor | None:
    """What a Linear of the engine should hold on this rank; None without such a tensor."""
    text = text_of(built.config)
    leaf = name.rpartition(".")[2]
    if leaf == "lm_head" and built.config["tie_word_embeddings"]:
        name = "model.embed_tokens"
    parts = [built.dense[key] for part in parts_of(name, generation, text) if (key := f"{part}.{local}") in built.dense]
    if not parts:
        return None
    if leaf in {"in_proj", "conv1d"}:
        return of_mamba(parts[0].flatten(1) if parts[0].dim() > 1 else parts[0], module, text, leaf=leaf)
    if text["model_type"] == "afmoe" and leaf == "qkv_proj":
        gate = built.dense[f"{name.rpartition('.')[0]}.gate_proj.{local}"]
        parts[0] = interleaved(parts[0], gate, text["num_attention_heads"])
    if module.tp_size > 1 and module.tp_mode == "column":
        return rows_of_rank(parts, module, text["num_key_value_heads"])
    whole = torch.cat(parts)
    cut = module.tp_size > 1 and module.tp_mode == "row" and local == "weight"
    return whole.chunk(module.tp_size, dim=1)[module.tp_rank] if cut else whole


def of_linear(name: str, module: Any, built: Built, generation: str) -> Iterator[tuple[str, bool]]:
    """Yield every stored Linear that one of the engine holds, and whether it holds something else."""
    wrong = differs(held_weight(module), slices(name, module, built, generation, "weight"))
    bias = slices(name, module, built, generation, "bias")
    wrong |= (module.bias is None) != (bias is None) or (bias is not None and differs(module.bias, bias))
    names = parts_of(name, generation, text_of(built.config))
    gate = f"{name.rpartition('.')[0]}.gate_proj"
    for part in (*names, *([gate] if name.endswith("qkv_proj") and f"{gate}.weight" in built.dense else ())):
        yield part, wrong


def of_ungated(name: str, module: Any, built: Built) -> Iterator[tuple[str, bool]]:
    """As `experts_of`, for experts without a gate."""
    size, rank = module.mapping.moe_tp_size, module.mapping.moe_tp_rank
    for at, expert in enumerate(module.expert_ids):
        for leaf, part, dim in (("up_proj", "w3_w1", 0), ("down_proj", "w2", 1)):
            exact = built.dense[f"{name}.{expert}.{leaf}.weight"].chunk(size, dim=dim)[rank]
            yield f"{name}.{expert}.{leaf}", differs(module.quant_method.dequantize(module, part, at), exact)


def of_parameters(name: str, module: Any, built: Built, ranks: tuple[int, int]) -> Iterator[tuple[str, bool]]:
    """Yield the bare parameters of a module; those of Mamba's heads are divided."""
    stem = stored_name(name, text_of(built.config)["model_type"])
    size, rank = ranks
    for local, parameter in module._parameters.items():
        if local == "e_score_correction_bias" or parameter is None:
            continue
        exact = built.dense[f"{stem}.{'A_log' if local == 'A' else local}"]
        if stem.endswith(("mixer", "mixer.norm")):
            exact = exact.chunk(size)[rank]
        yield f"{stem}.{local}", differs(parameter.float(), -exact.exp() if local == "A" else exact)


def of_table(name: str, module: Any, built: Built) -> Iterator[tuple[str, bool]]:
    stem = stored_name(name, text_of(built.config)["model_type"])
    mapping = module.mapping
    yield stem, differs(module.weight.float(), built.dense[f"{stem}.weight"].chunk(mapping.tp_size)[mapping.tp_rank])


def compared(model: Any, built: Built, generation: str) -> dict[str, bool]:
    """Return everything that a rank holds, and whether it is something else than its slice of what is stored."""
    found: dict[str, bool] = {}
    mapping = model.model_config.mapping
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear":
            found |= of_linear(name, module, built, generation)
        elif hasattr(module, "expert_ids"):
            of = experts_of if module.gated else of_ungated
            stem = stored_name(name.removesuffix(".backend"), text_of(built.config)["model_type"])
            found |= of(stem, module, built.dense if module.gated else built)  # type: ignore[operator]
        elif kind == "Embedding":
            found |= of_table(name, module, built)
        elif kind not in {"RMSNorm", "Attention"}:
            found |= of_parameters(name, module, built, (mapping.tp_size, mapping.tp_rank))
    return found


def ranks_of(engine: Any, directory: Path, tensor: int, *, stock: bool) -> Iterator[Any]:
    """Yield the text model of each rank of a directory, loaded by stock or by this package."""
    more = {"skip_tokenizer_init": True, "tensor_parallel_size": tensor}
    with engine.LLM(model=str(directory), **more) if stock else trtllm_ct.LLM(directory, **more) as llm:
        assert len(llm.models) == tensor
        yield from (getattr(model, "llm", model) for model in llm.models)


def linears_of(built: Built) -> set[str]:
    """All stored matrices."""
    return {key.removesuffix(".weight") for key, tensor in built.dense.items() if tensor.dim() == 2}


def check_ranks(built: Built, out: Path, generation: str, tensor: int) -> None:
    release = engine_double.RELEASE_OF[generation]
    convert_checkpoint(built.directory, out, engine=release, parallel=Parallel(tensor=tensor))
    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        for directory, stock in ((out, True), (built.directory, False)):
            for model in ranks_of(engine, directory, tensor, stock=stock):
                found = compared(model, built, generation)
                assert {name for name, wrong in found.items() if wrong} == set()
                missing = linears_of(built) - {name.removesuffix(".weight") for name in found}
                assert missing <= ({"lm_head"} if built.config["tie_word_embeddings"] else set())


@pytest.mark.pairs
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", DECODERS)
def test_each_rank_holds_its_slices(
    stored: Callable[..., Built], tmp_path: Path, name: str, scheme: str, tensor: int
) -> None:
    check_ranks(stored(name, scheme), tmp_path / "out", "newest", tensor)


@pytest.mark.parametrize("scheme", ["fp8-channel-token", "nvfp4"])
@pytest.mark.parametrize(("name", "generation"), OLDER)
def test_older_releases_hold_them_too(
    stored: Callable[..., Built], tmp_path: Path, name: str, generation: str, scheme: str
) -> None:
    check_ranks(stored(name, scheme), tmp_path / "out", generation, 2)


@pytest.mark.parametrize(
    "name", ["Cohere2ForCausalLM", "LagunaForCausalLM", "Glm4MoeForCausalLM", "GlmMoeDsaForCausalLM"]
)
def test_classes_that_look_at_the_global_mode_hold_a_mixed_model(tmp_path: Path, name: str) -> None:
    """They refuse several modes, or build some Linears in the global one."""
    schemes = {"o_proj": "int4-g128", "mlp.down_proj": "fp8-channel-token", "experts.down_proj": "nvfp4"}
    check_ranks(write_decoder(tmp_path / "in", name, schemes), tmp_path / "out", "newest", 2)


@pytest.mark.parametrize("tensor", [1, 2])
def test_glm_may_have_no_norms_of_heads(tmp_path: Path, tensor: int) -> None:
    """GLM-4.5-Air has `use_qk_norm: false`, and the class builds other attention for it."""
    built = write_decoder(tmp_path / "in", "Glm4MoeForCausalLM", "fp8-channel-token", use_qk_norm=False)
    assert not any("q_norm" in name for name in built.stored)

    check_ranks(built, tmp_path / "out", "newest", tensor)


@pytest.mark.newest_transformers
@pytest.mark.parametrize("generation", ["newest", "mid"])
def test_experts_of_nemotron_h_have_an_entry_that_the_class_finds(tmp_path: Path, generation: str) -> None:
    """It takes the first one that begins with their name and a dot, and builds plain experts without any."""
    schemes = {"mixer.q_proj": "fp8-channel-token", "mixer.k_proj": "fp8-channel-token"}
    schemes |= {"mixer.v_proj": "fp8-channel-token", "up_proj": "nvfp4", "down_proj": "nvfp4"}
    built = write_decoder(tmp_path / "in", "NemotronHForCausalLM", schemes)
    check_ranks(built, tmp_path / "out", generation, 1)
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text(encoding="utf-8"))
    assert "model.layers.3.mixer.experts.0.up_proj" in config["quantization"]["quantized_layers"]


@pytest.mark.newest_transformers
def test_attention_that_is_called_mixer_has_scales_of_the_cache(tmp_path: Path) -> None:
    """Nemotron-H: the scales are delivered in the projections, and outputs at a fixed scale are reported."""
    built = write_decoder(tmp_path / "in", "NemotronHForCausalLM", "fp8-channel-token")
    attention = "backbone.layers.1.mixer"
    scales = {f"{attention}.{name}_scale": torch.tensor([0.02]).bfloat16() for name in "kv"}
    rewrite(built.directory, lambda stored: stored.update(scales))
    rewrite_config(
        built.directory, lambda config: config["quantization_config"].update(kv_cache_scheme=fp8_weights("tensor"))
    )
    plan = inspect_checkpoint(built.directory, "modelopt", engine="stock-1.3").plan
    delivered = {delivery.name for module in plan.modules for delivery in module.deliveries}
    assert {f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"} <= delivered
    assert any("attention quantizes their input at a fixed scale" in warning for warning in plan.warnings)
    convert_checkpoint(built.directory, tmp_path / "out", engine="stock-1.3")
    assert verify_checkpoint(built.directory, tmp_path / "out").good


def plain_logits(built: Built) -> Tensor:
    """Logits of transformers' own model of the exact weights, in float32."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    directory = built.directory / "exact"
    directory.mkdir(exist_ok=True)
    config = {key: value for key, value in text_of(built.config).items() if key != "quantization_config"}
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    exact = {key: value.float().contiguous() for key, value in built.dense.items()}
    save_file(exact, directory / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory, **in_dtype(torch.float32))
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


@pytest.mark.values
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", DECODERS)
def test_conversions_are_verified_and_give_the_logits_of_the_exact_weights(
    stored: Callable[..., Built], tmp_path: Path, name: str, scheme: str
) -> None:
    from trtllm_ct.reference.engine import load_model

    built, out = stored(name, scheme), tmp_path / "out"
    convert_checkpoint(built.directory, out, engine="stock-1.3", dtype="float32")
    assert verify_checkpoint(built.directory, out).good
    model: Any = load_model(out, dtype=torch.float32, quantize_activations=False)
    want = plain_logits(built)
    with torch.no_grad():
        got = model(TOKENS).logits
    assert float((got - want).abs().max() / want.std()) < 1e-4
