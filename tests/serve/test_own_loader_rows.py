"""Classes that load their weights themselves, on the double: each rank's tensors, on one, two and four ranks.

Every Linear, every expert and every other parameter holds the slice of the stored values that the class computes with,
from a directory that was converted for stock, and loaded by this package.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from engine_fixtures import BINDINGS
from own_loader_models import OWN_LOADERS, write_own_loader
from rank_slices import differs, experts_of, held_weight, rows_of_rank

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

TOKENS = torch.arange(2, 14)[None]
SCHEMES = ("fp8-channel-token", "int4-g128", "fp8-block", "nvfp4")
DEEPSEEK, GPT_OSS, HUNYUAN = "DeepseekV4ForCausalLM", "GptOssForCausalLM", "HunYuanMoEV1ForCausalLM"
MLLAMA = "MllamaForConditionalGeneration"
OLDER = [
    (name, generation)
    for name in (HUNYUAN, GPT_OSS, MLLAMA)
    for generation in ("old", "mid")
    # Whether the class finds experts in 1.2, which wraps them, is not known.
    if (name, generation) != (HUNYUAN, "mid")
]
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "kv_a_proj_with_mqa": ("wq_a", "wkv"),
    "wkv_gate": ("wkv", "wgate"),
}
STORED = {
    HUNYUAN: ((r"\.mlp\.gate$", ".mlp.gate.wg"),),
    GPT_OSS: (
        (r"^model\.embedding", "model.embed_tokens"),
        (r"^model\.block\.(\d+)\.attn\.norm", r"model.layers.\1.input_layernorm"),
        (r"^model\.block\.(\d+)\.mlp\.norm", r"model.layers.\1.post_attention_layernorm"),
        (r"^model\.block\.(\d+)\.mlp\.gate", r"model.layers.\1.mlp.router"),
        (r"^model\.block\.(\d+)\.attn", r"model.layers.\1.self_attn"),
        (r"^model\.block\.", "model.layers."),
    ),
    DEEPSEEK: (
        (r"^lm_head", "head"),
        (r"^model\.embed_tokens", "embed"),
        (r"^model\.", ""),
        (r"\.self_attn\b", ".attn"),
        (r"\.mlp\b", ".ffn"),
        (r"\.([qo])_([ab])_proj", r".w\1_\2"),
        (r"\.q_a_layernorm", ".q_norm"),
        (r"\.kv_a_layernorm", ".kv_norm"),
        (r"\.input_layernorm", ".attn_norm"),
        (r"\.post_attention_layernorm", ".ffn_norm"),
        (r"\.down_proj", ".w2"),
    ),
}
"""What turns names of the engine into those of the files, by class."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """Return each checkpoint, which is written once."""
    written: dict[tuple[str, str], Built] = {}

    def get(name: str, scheme: str) -> Built:
        if (name, scheme) not in written:
            written[name, scheme] = write_own_loader(tmp_path_factory.mktemp("stored") / "in", name, scheme)
        return written[name, scheme]

    return get


def class_of(built: Built) -> str:
    name: str = built.config["architectures"][0]
    return name


def stored_name(name: str, built: Built) -> str:
    for pattern, replacement in STORED.get(class_of(built), ()):
        name = re.sub(pattern, replacement, name)
    return name


def parts_of(name: str, built: Built) -> list[str]:
    """The stored modules whose rows one Linear of the engine has, in order."""
    around, _, leaf = name.rpartition(".")
    parts = FUSED.get(leaf, (leaf,))
    if leaf == "gate_up_proj" and class_of(built) == DEEPSEEK:
        parts = ("w1", "w3")
    return [f"{around}.{part}".lstrip(".") for part in parts]


def slices(name: str, module: Any, built: Built, local: str) -> Tensor | None:
    """What a Linear of the engine should hold on this rank; None without such a tensor."""
    parts = [built.dense[key] for part in parts_of(name, built) if (key := f"{part}.{local}") in built.dense]
    if not parts:
        return None
    if getattr(module, "tp_size", 1) > 1 and module.tp_mode == "column":
        text = built.config.get("text_config", built.config)
        return rows_of_rank(parts, module, text["num_key_value_heads"])
    whole = torch.cat(parts)
    cut = getattr(module, "tp_size", 1) > 1 and module.tp_mode == "row" and local == "weight"
    return whole.chunk(module.tp_size, dim=1)[module.tp_rank] if cut else whole


def of_linear(name: str, module: Any, built: Built) -> Iterator[tuple[str, bool]]:
    """Yield every stored Linear that one of the engine holds, and whether it holds something else."""
    wrong = differs(held_weight(module), slices(name, module, built, "weight"))
    bias = slices(name, module, built, "bias")
    wrong |= (module.bias is None) != (bias is None) or (bias is not None and differs(module.bias, bias))
    for part in parts_of(name, built):
        yield part, wrong


def of_biases(name: str, module: Any, built: Built) -> Iterator[tuple[str, bool]]:
    for expert in range(module.num_experts):
        gate, up = module.w3_w1_bias[expert].chunk(2)
        for leaf, bias in (("gate_proj", gate), ("up_proj", up), ("down_proj", module.w2_bias[expert])):
            key = f"{name}.{expert}.{leaf}.bias"
            yield key, differs(bias.double(), built.dense[key])


def parameter_name(module: str, local: str) -> str:
    """The name in the files of a bare parameter."""
    if module.endswith((".sinks", ".router_bias")):
        return module
    if re.search(r"\bhc_(attn|ffn|head)$", module):
        return f"{module}_{local}"
    return f"{module}.{ {'o_a_proj': 'wo_a.weight', 'e_score_correction_bias': 'bias'}.get(local, local) }"


def of_others(name: str, module: Any, built: Built, ranks: tuple[int, int]) -> Iterator[tuple[str, bool]]:
    """Yield the bare parameters of a module; embeddings and those of heads and groups may be divided."""
    for local, parameter in module._parameters.items():
        if parameter is None:
            continue
        key = parameter_name(name, local)
        exact = built.dense[key]
        cut = len(exact) != len(parameter)
        wrong = differs(parameter.double(), exact.chunk(ranks[0])[ranks[1]] if cut else exact)
        yield key.removesuffix(".weight"), wrong


def compared(model: Any, built: Built) -> dict[str, bool]:
    """Return everything that a rank holds, and whether it is something else than its slice of what is stored."""
    found: dict[str, bool] = {}
    mapping = model.model_config.mapping
    for engine_name, module in model.named_modules():
        name = stored_name(engine_name.removesuffix(".backend"), built)
        if name.endswith("indexer.wk"):
            continue  # The loader makes it, and nothing uses it.
        if type(module).__name__ == "Linear" and hasattr(module, "quant_method"):
            found |= of_linear(name, module, built)
        elif hasattr(module, "expert_ids"):
            found |= experts_of(name, module, built.dense)
            found |= of_biases(name, module, built) if module.biased else ()
        else:
            found |= of_others(name, module, built, (mapping.tp_size, mapping.tp_rank))
    return found


def expected_in(built: Built) -> set[str]:
    """All stored matrices of the text model; the double of Mllama has no layers of cross-attention."""
    names = {key.removesuffix(".weight") for key, tensor in built.dense.items() if tensor.dim() == 2}
    mllama = class_of(built) == MLLAMA
    return {name for name in names if not (mllama and ("vision_model" in name or ".layers.1." in name))}


def ranks_of(engine: Any, directory: Path, tensor: int, *, stock: bool) -> Iterator[Any]:
    more = {"skip_tokenizer_init": True, "tensor_parallel_size": tensor}
    with engine.LLM(model=str(directory), **more) if stock else trtllm_ct.LLM(directory, **more) as llm:
        assert len(llm.models) == tensor
        yield from llm.models


def check_ranks(built: Built, out: Path, generation: str, tensor: int) -> None:
    release = engine_double.RELEASE_OF[generation]
    convert_checkpoint(built.directory, out, engine=release, parallel=Parallel(tensor=tensor))
    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        for directory, stock in ((out, True), (built.directory, False)):
            for model in ranks_of(engine, directory, tensor, stock=stock):
                found = compared(model, built)
                assert {name for name, wrong in found.items() if wrong} == set()
                assert expected_in(built) - found.keys() == set()


@pytest.mark.pairs
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", OWN_LOADERS)
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


@pytest.mark.parametrize("name", OWN_LOADERS)
def test_a_model_with_several_modes_and_plain_linears_is_held_too(tmp_path: Path, name: str) -> None:
    schemes = {
        "o_proj": "int4-g128",
        "mlp.down_proj": "fp8-channel-token",
        "layers.0.self_attn.q_proj": "fp8-channel-token",
        "1.down_proj": "nvfp4",
    }
    check_ranks(write_own_loader(tmp_path / "in", name, schemes), tmp_path / "out", "newest", 2)


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
EXPERTS = {"w1", "w2", "w3"}
MLP = {"gate_proj", "up_proj", "down_proj"}
KEPT = {
    (HUNYUAN, "fp8-channel-token"): ATTENTION | MLP,
    (HUNYUAN, "int4-g128"): {"o_proj"} | MLP,
    (HUNYUAN, "fp8-block"): ATTENTION | EXPERTS | MLP,
    (HUNYUAN, "nvfp4"): ATTENTION | EXPERTS | MLP,
    (GPT_OSS, "fp8-channel-token"): ATTENTION,
    (GPT_OSS, "int4-g128"): ATTENTION,
    (GPT_OSS, "fp8-block"): ATTENTION,
    (GPT_OSS, "nvfp4"): set(),
    ("Step3p5ForCausalLM", "fp8-channel-token"): set(),
    ("Step3p5ForCausalLM", "int4-g128"): set(),
    ("Step3p5ForCausalLM", "fp8-block"): EXPERTS,
    ("Step3p5ForCausalLM", "nvfp4"): EXPERTS,
    (DEEPSEEK, "fp8-channel-token"): {"wq_b", "wo_b"} | EXPERTS,
    (DEEPSEEK, "int4-g128"): {"wq_b", "wo_b"} | EXPERTS,
    (DEEPSEEK, "fp8-block"): {"wq_b"} | EXPERTS,
    (DEEPSEEK, "nvfp4"): {"wq_b", "wo_b"} | EXPERTS,
    **{(MLLAMA, scheme): ATTENTION | MLP for scheme in SCHEMES},
}
"""The last parts of the names of the Linears that stay quantized; all experts of DeepSeek-V4 have the same ones."""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", OWN_LOADERS)
def test_conversions_are_verified_and_keep_what_the_class_reads(
    stored: Callable[..., Built], tmp_path: Path, name: str, scheme: str
) -> None:
    built = stored(name, scheme)
    plan = convert_checkpoint(built.directory, tmp_path / "out", engine="stock-1.3").plan
    assert verify_checkpoint(built.directory, tmp_path / "out").good
    assert {module.name.rpartition(".")[2] for module in plan.modules if module.layer is not None} == KEPT[name, scheme]


def stacked(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with experts that have biases, those of gpt-oss, in stacks [E, in, out].

    The rows of gate and up alternate.
    """
    layers = [key.removesuffix(".0.gate_proj.bias") for key in dense if key.endswith(".mlp.experts.0.gate_proj.bias")]
    result = {key: tensor.float() for key, tensor in dense.items() if not key.startswith(tuple(layers))}
    for around in layers:
        for local, name in (("weight", ""), ("bias", "_bias")):
            each = [
                [dense[f"{around}.{expert}.{leaf}.{local}"].float() for leaf in ("gate_proj", "up_proj", "down_proj")]
                for expert in range(4)
            ]
            pairs = torch.stack([torch.stack([gate, up], dim=1).flatten(0, 1) for gate, up, _ in each])
            down = torch.stack([entry[2] for entry in each])
            result[f"{around}.gate_up_proj{name}"] = pairs.mT if local == "weight" else pairs
            result[f"{around}.down_proj{name}"] = down.mT if local == "weight" else down
    return result


def plain_logits(built: Built) -> Tensor:
    """Logits of transformers' own model of the exact weights, in float32, for text alone."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    directory = built.directory / "exact"
    directory.mkdir(exist_ok=True)
    config = {key: value for key, value in built.config.items() if key != "quantization_config"}
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    exact = stacked(built.dense)
    exact |= {key: tensor.long() for key, tensor in built.dense.items() if key.endswith("tid2eid")}
    save_file(
        {key: tensor.contiguous() for key, tensor in exact.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    whole = AutoModelForImageTextToText if class_of(built) == MLLAMA else AutoModelForCausalLM
    model = whole.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [HUNYUAN, GPT_OSS, DEEPSEEK, MLLAMA])
def test_conversions_give_the_logits_of_the_exact_weights(
    stored: Callable[..., Built], tmp_path: Path, name: str, scheme: str
) -> None:
    from trtllm_ct.reference.engine import load_model

    built = stored(name, scheme)
    convert_checkpoint(built.directory, tmp_path / "out", engine="stock-1.3", dtype="float32")
    model: Any = load_model(tmp_path / "out", dtype=torch.float32, quantize_activations=False)
    want = plain_logits(built)
    with torch.no_grad():
        got = model(TOKENS).logits
    assert float((got - want).abs().max() / want.std()) < 1e-4
