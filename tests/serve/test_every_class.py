"""Every model class that the double has, on every generation, on one, two and four ranks: each rank's weights.

Layers are stored by different schemes, or all by one. On each rank every Linear and every expert holds its slice of the
stored values, and adds its slice of the bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import decoder_models
import engine_double
import pytest
import torch
from builders import DENSE, Built, tiny_config, write_checkpoint
from class_models import CLASSES
from decoder_models import DECODERS
from engine_fixtures import BINDINGS
from multimodal import write_multimodal
from own_loader_models import OWN_LOADERS
from rank_slices import differs, experts_of, held_weight, rows_of_rank
from stacked_models import STACKED
from tiny_models import linears, never_quantized

import trtllm_ct
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.model_classes import WRAPPERS as ENGINE_WRAPPERS
from trtllm_ct.engine.model_classes import first_release
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.plan.models.class_rows import CLASS_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("sidecar_cache")

SCHEMES = ("int4-g128", "int8-channel", "fp8-channel-token", "fp8-block", "nvfp4")
MIXTURES = {"mixed": SCHEMES, "mixed for SM90": SCHEMES[:-1], "mixed for SM100": SCHEMES[2:]}
"""Schemes of layers, one after another. In the oldest release no GPU has all modes of the first one."""
_EXPERTS = {"moe_intermediate_size": 512, "num_experts": 2}
_LATENT = {
    "head_dim": None,
    "num_key_value_heads": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "moe_intermediate_size": 512,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
}
TEXT: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True},
    "MistralForCausalLM": {"num_key_value_heads": 2},
    "MixtralForCausalLM": {"num_key_value_heads": 2, "num_local_experts": 2},
    "Qwen2ForCausalLM": {},
    "Qwen2MoeForCausalLM": {**_EXPERTS, "num_key_value_heads": 4, "shared_expert_intermediate_size": 256},
    "Qwen3ForCausalLM": {"num_key_value_heads": 2},
    "Qwen3MoeForCausalLM": {**_EXPERTS, "attention_bias": True},
    "DeepseekV3ForCausalLM": _LATENT,
    "Gemma3ForCausalLM": {},
    "Phi3ForCausalLM": {},
}
"""What config.json has beside the sizes. With two K/V heads, four ranks repeat them; engines don't repeat biases so."""
# The text model, its prefix in the files, the tower, and the kinds of the outer and the inner model.
WRAPPERS = {
    "Gemma3ForConditionalGeneration": (
        "Gemma3ForCausalLM",
        "model.language_model.",
        "model.vision_tower",
        ("gemma3", "gemma3_text"),
    ),
    "Mistral3ForConditionalGeneration": (
        "MistralForCausalLM",
        "model.language_model.",
        "model.vision_tower",
        ("mistral3", "mistral"),
    ),
    "Qwen2VLForConditionalGeneration": (
        "Qwen2ForCausalLM",
        "model.language_model.",
        "model.visual",
        ("qwen2_vl", "qwen2_vl_text"),
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2ForCausalLM",
        "model.",
        "visual",
        ("qwen2_5_vl", "qwen2_5_vl_text"),
    ),
    "Qwen3VLForConditionalGeneration": (
        "Qwen3ForCausalLM",
        "model.language_model.",
        "model.visual",
        ("qwen3_vl", "qwen3_vl_text"),
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "Qwen3MoeForCausalLM",
        "model.language_model.",
        "model.visual",
        ("qwen3_vl_moe", "qwen3_vl_moe_text"),
    ),
    "KimiK25ForConditionalGeneration": (
        "DeepseekV3ForCausalLM",
        "language_model.model.",
        "vision_tower",
        ("kimi_k25", "kimi_k2"),
    ),
}
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "kv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
SINCE = {
    "Qwen3VLForConditionalGeneration": "mid",
    "Qwen3VLMoeForConditionalGeneration": "mid",
    "KimiK25ForConditionalGeneration": "newest",
}
"""The first generation of classes that not all generations have."""
IN_OLD = {
    *("GptOssForCausalLM", "HunYuanMoEV1ForCausalLM", "Llama4ForConditionalGeneration"),
    "MllamaForConditionalGeneration",
}
"""The classes of tests/serve/test_{own_loader,stacked}_rows.py that all generations have."""
CELLS = [
    (name, generation)
    for name in (*TEXT, *WRAPPERS)
    for generation in engine_double.GENERATIONS[engine_double.GENERATIONS.index(SINCE.get(name, "old")) :]
]


def config_of(architecture: str, layers: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {"hidden": 128, "heads": 8, "kv_heads": 4, "intermediate": 512, "head_dim": 64}
    if architecture == "Phi3ForCausalLM":
        # The class computes the size of a head.
        sizes |= {"hidden": 256, "head_dim": 32}
    return tiny_config(architecture, layers=layers, **(sizes | TEXT[architecture]))


def write(directory: Path, name: str, scheme: str) -> Built:
    """Write a checkpoint of a class; with one of `MIXTURES` each layer has another scheme."""
    architecture = WRAPPERS[name][0] if name in WRAPPERS else name
    config = config_of(architecture, len(MIXTURES.get(scheme, ("", ""))))
    schemes: Any = scheme
    if scheme in MIXTURES:
        schemes = {
            module: DENSE if never_quantized(module) else MIXTURES[scheme][int(module.split(".")[2])]
            for module, _, _ in linears(config)
            if module != "lm_head"
        }
    if name not in WRAPPERS:
        return write_checkpoint(directory, config=config, scheme=schemes)
    _, body, tower, kinds = WRAPPERS[name]
    vision = {f"{tower}.blocks.0.fc1.weight": (16, 8)}
    more = {"text": config, "architecture": name, "kinds": kinds}
    return write_multimodal(directory, body, vision=vision, scheme=schemes, **more)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Built]:
    """Return each checkpoint, which is written once."""
    written: dict[tuple[str, str], Built] = {}

    def get(name: str, scheme: str) -> Built:
        if (name, scheme) not in written:
            written[name, scheme] = write(tmp_path_factory.mktemp("stored") / "in", name, scheme)
        return written[name, scheme]

    return get


def ranks(engine: Any, built: Built, out: Path | None, tensor: int) -> Iterator[Any]:
    """Yield the text model of each rank, of a directory converted to `out` or, without one, loaded by this package."""
    more = {"skip_tokenizer_init": True, "tensor_parallel_size": tensor}
    with engine.LLM(model=str(out), **more) if out else trtllm_ct.LLM(built.directory, **more) as llm:
        assert len(llm.models) == tensor
        yield from (getattr(model, "llm", model) for model in llm.models)


def stored_names(name: str, config: Mapping[str, Any]) -> list[str]:
    """Return the stored Linears that one Linear of the engine holds, in order."""
    around, _, leaf = name.rpartition(".")
    if config["model_type"] == "phi3":
        return [name]
    return [f"{around}.{part}".lstrip(".") for part in FUSED.get(leaf, (leaf,))]


def stored_parts(name: str, config: Mapping[str, Any], dense: Mapping[str, Tensor], local: str) -> list[Tensor]:
    """Return a tensor of every stored Linear that one Linear of the engine holds, in order; none without a bias."""
    leaf = name.rpartition(".")[2]
    parts = [dense[key] for module in stored_names(name, config) if (key := f"{module}.{local}") in dense]
    if config["model_type"] == "phi3" and leaf in FUSED and parts:
        heads = [config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value", "key_value")]
        parts = list(parts[0].split(heads if leaf == "qkv_proj" else [config["intermediate_size"]] * 2))
    return parts


def wrong_linear(name: str, module: Any, config: Mapping[str, Any], dense: Mapping[str, Tensor]) -> bool:
    """Whether the weight or the bias of a Linear is not this rank's slice of the stored ones."""
    heads = config["num_key_value_heads"]
    weights, biases = (stored_parts(name, config, dense, local) for local in ("weight", "bias"))
    weight, bias = torch.cat(weights), torch.cat(biases) if biases else torch.zeros(1)
    if module.tp_size > 1 and module.tp_mode == "column":
        weight = rows_of_rank(weights, module, heads)
        bias = rows_of_rank(biases, module, heads) if biases else bias
    elif module.tp_size > 1 and module.tp_mode == "row":
        weight = weight.chunk(module.tp_size, dim=1)[module.tp_rank]
    adds = module.quant_method.apply(module, torch.zeros(1, module.in_features), module.bias)[0]
    return differs(held_weight(module), weight) or differs(adds, bias.expand(adds.shape))


def compared(model: Any, built: Built) -> dict[str, bool]:
    """Return every stored Linear that a rank holds a slice of, and whether it holds another one.

    Routers may be bare parameters, which every rank holds whole.
    """
    wrong: dict[str, bool] = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear":
            differing = wrong_linear(name, module, built.config, built.dense)
            wrong |= dict.fromkeys(stored_names(name, built.config), differing)
        elif hasattr(module, "expert_ids"):
            wrong |= dict(experts_of(name.removesuffix(".backend"), module, built.dense))
        elif name.endswith(".mlp.gate"):
            wrong[name] = differs(module.weight, built.dense[f"{name}.weight"])
    return wrong


def classes_of_the_double() -> dict[str, str]:
    """Return the first generation of each class."""
    with engine_double.installed():
        from tensorrt_llm._torch.models._arch_index import ARCHITECTURES

        return {name: row.since for name, row in ARCHITECTURES.items()}


def test_the_double_has_every_claimed_class_in_the_same_releases_and_no_other() -> None:
    """A class that no release has is claimed for plans that are made anyway: `class_problems` says so."""
    firsts = {name: first_release(name) for name in (*CLASS_ROWS, *ENGINE_WRAPPERS)}
    claimed = {name: engine_double.GENERATION_OF[first.name] for name, first in firsts.items() if first is not None}

    assert classes_of_the_double() == claimed


def test_every_class_of_the_double_is_loaded() -> None:
    since = classes_of_the_double()
    by_row = {name: "mid" if name == "Qwen3NextForCausalLM" else "newest" for name in CLASSES}
    by_row |= {name: decoder_models.SINCE.get(name, "newest") for name in DECODERS}
    by_row |= {name: "old" if name in IN_OLD else "newest" for name in (*OWN_LOADERS, *STACKED)}
    assert since == {name: SINCE.get(name, "old") for name in (*TEXT, *WRAPPERS)} | by_row


@pytest.mark.pairs
@pytest.mark.parametrize(("scheme", "tensor"), [("mixed", 1), ("mixed", 2), ("mixed", 4), ("fp8-block", 2)])
@pytest.mark.parametrize(("name", "generation"), CELLS)
def test_each_rank_holds_its_slices(
    stored: Callable[[str, str], Built], tmp_path: Path, name: str, generation: str, scheme: str, tensor: int
) -> None:
    """Converted for stock, and loaded by this package."""
    split = (scheme, generation) == ("mixed", "old")
    for mixture in ("mixed for SM90", "mixed for SM100") if split else (scheme,):
        built, out = stored(name, mixture), tmp_path / mixture
        release = engine_double.RELEASE_OF[generation]
        convert_checkpoint(built.directory, out, engine=release, parallel=Parallel(tensor=tensor))
        right = {module: False for module, _, _ in linears(built.config)}

        with engine_double.installed(generation, importers=[BINDINGS]) as engine:
            for directory in (out, None):
                for model in ranks(engine, built, directory, tensor):
                    assert compared(model, built) == right
