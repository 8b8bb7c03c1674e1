"""Every tensor that a plan delivers is read by the engine's class, or the plan names it.

Each tensor of a tiny model has a value of its own. Whatever the double's parameters don't hold after stock has loaded
the converted directory, the class has not read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import DENSE, rewrite, rewrite_config, tiny_config, write_checkpoint
from class_models import CLASSES, write_class
from decoder_models import DECODERS, write_decoder
from engine_fixtures import BINDINGS
from installed_transformers import in_dtype
from own_loader_models import OWN_LOADERS, write_own_loader
from safetensors.torch import load_file
from stacked_models import STACKED, write_stacked
from tiny_models import FAMILIES

import trtllm_ct
from trtllm_ct import convert_checkpoint
from trtllm_ct.base.errors import PlanError
from trtllm_ct.engine.model_classes import has_class
from trtllm_ct.engine.releases import RELEASES
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan.models.class_rows import CLASS_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.base.errors import Fault
    from trtllm_ct.plan.plan import Plan

pytestmark = [pytest.mark.reference, pytest.mark.newest_transformers]

NEWEST = RELEASES[-1].name
WRITERS: dict[str, Callable[[Path, str], object]] = {
    **dict.fromkeys(
        (name for name in FAMILIES if has_class(RELEASES[-1], name)),
        lambda directory, name: write_checkpoint(directory, config=tiny_config(name), scheme=DENSE),
    ),
    **dict.fromkeys(CLASSES, lambda directory, name: write_class(directory, name, DENSE)),
    **dict.fromkeys(DECODERS, lambda directory, name: write_decoder(directory, name, {})),
    **dict.fromkeys(OWN_LOADERS, lambda directory, name: write_own_loader(directory, name, {})),
    **dict.fromkeys(STACKED, lambda directory, name: write_stacked(directory, name, {})),
}
"""What writes a plain tiny checkpoint of each class."""
KEYS = ("attention_bias", "attention_out_bias", "qkv_bias", "mlp_bias", "use_bias", "use_conv_bias", "mamba_proj_bias")
"""The keys of config.json that give Linears a bias in some class of transformers."""
TOWERS = ("visual", "vision", "multi_modal")


def template(name: str) -> str:
    """The name of a tensor without its layer and its expert."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{name}").removeprefix(".")


def with_own_values(stored: dict[str, Tensor]) -> None:
    """Give the tensors of each kind a value that no other kind has, and that bfloat16 holds: even numbers.

    The logarithms of Mamba get the smallest, since the class takes the exponential of them.
    """
    kinds = sorted({template(name) for name in stored}, key=lambda name: ("A_log" not in name, name))
    assert len(kinds) < 128
    for name, tensor in stored.items():
        tensor.fill_(2 * kinds.index(template(name)) + 2)


def with_options(stored: dict[str, Tensor]) -> None:
    """Add a bias to every Linear and to the head, and what attention has in some class, to all layers."""
    for name, tensor in list(stored.items()):
        module, _, local = name.rpartition(".")
        if local != "weight" or any(tower in name for tower in TOWERS) or "embed" in name:
            continue
        if tensor.dim() == 2 or "conv1d" in module:
            stored.setdefault(f"{module}.bias", torch.zeros(tensor.shape[0], dtype=tensor.dtype))
        if module.endswith("q_proj"):
            around = module.rpartition(".")[0]
            for local in ("q_norm.weight", "k_norm.weight", "sinks"):
                stored.setdefault(f"{around}.{local}", torch.zeros(8, dtype=tensor.dtype))


def values_held(directory: Path) -> set[float]:
    """All values that the parameters of the double's model hold after stock has loaded a directory."""
    with (
        engine_double.installed("newest") as engine,
        engine.LLM(model=str(directory), skip_tokenizer_init=True) as llm,
    ):
        (model,) = llm.models
        tensors = [*model.parameters(), *model.buffers()]
        return {value for tensor in tensors for value in tensor.float().unique().tolist()}


def unread(directory: Path) -> set[str]:
    """The kinds of delivered tensors of the text model that the class has not read."""
    held = values_held(directory)
    found = set()
    for name, tensor in load_file(directory / "model.safetensors").items():
        value = float(tensor.flatten()[0])
        # Gemma 3 holds norms with 1 added to them, and Mamba the negative exponential of `A_log`.
        forms = {value, value + 1, float(-torch.tensor(value).exp())}
        if held.isdisjoint(forms) and not any(tower in name for tower in TOWERS):
            found.add(template(name))
    return found


def named(plan: Plan, kinds: set[str]) -> set[str]:
    """The kinds of tensors that the plan says the class does not read."""
    texts = [fault.found for fault in plan.problems if fault.found.startswith("biases of")]
    paths = {path for text in texts for path in text.removeprefix("biases of ").partition(", which")[0].split(", ")}
    biases = {kind for kind in kinds if any(path_of(kind).endswith(f".{path}.bias") for path in paths)}
    warned = " ".join(text for text in plan.warnings if "of the engine" in text)
    unbuilt = {part for text in re.findall(r"builds no ([\w ]+), and", warned) for part in text.split(" and no ")}
    return {
        kind
        for kind in kinds
        if not any(tower in kind for tower in TOWERS)
        if kind in biases or re.search(kind.replace("*", "[0-9]+"), warned) or any(part in kind for part in unbuilt)
    }


def path_of(kind: str) -> str:
    """A kind of tensor by its path in a layer behind a dot, or by its name."""
    return "." + re.sub(r"experts\.\*\.", "experts.", kind.partition("layers.*.")[2] or kind)


def plain(directory: Path, name: str) -> None:
    """Write a tiny plain checkpoint of a class, without a quantization block."""
    WRITERS[name](directory, name)
    rewrite_config(directory, lambda config: config.pop("quantization_config", None))


def convert(directory: Path) -> Path:
    out = directory.with_name("out")
    convert_checkpoint(directory, out, engine=NEWEST)
    return out


def test_every_row_of_a_class_of_this_release_is_here() -> None:
    """Kimi K2.5 and the wrappers of Qwen have the row of their text model."""
    assert {name for name in CLASS_ROWS if has_class(RELEASES[-1], name)} <= WRITERS.keys()


@pytest.mark.parametrize("name", WRITERS)
def test_each_tensor_is_read_or_named(tmp_path: Path, name: str) -> None:
    plain(tmp_path / "in", name)
    rewrite(tmp_path / "in", with_own_values)

    out = convert(tmp_path / "in")

    plan = plan_checkpoint(tmp_path / "in", engine=NEWEST)
    assert plan.problems == ()
    assert unread(out) == named(plan, {template(spec) for spec in plan.delivered_specs})


@pytest.mark.parametrize("name", WRITERS)
def test_each_optional_tensor_is_read_or_named(tmp_path: Path, name: str) -> None:
    """Every Linear has a bias, and config.json asks for all of them; what a plan refuses is left out."""
    source = tmp_path / "in"
    plain(source, name)
    rewrite(source, with_options)
    rewrite_config(source, switch_on)
    surplus = refused(source)
    rewrite(source, lambda stored: [stored.pop(tensor) for tensor in surplus])  # type: ignore[arg-type, return-value]
    rewrite(source, with_own_values)

    out = convert(source)

    plan = plan_checkpoint(source, engine=NEWEST)
    if any(fault.found.startswith("none of") for fault in plan.problems):
        with pytest.raises(KeyError, match="bias"):
            unread(out)
        return
    assert unread(out) == named(plan, {template(spec) for spec in plan.delivered_specs})


def switch_on(config: dict[str, Any]) -> None:
    for level in (config, config.get("text_config", {})):
        level.update(dict.fromkeys(KEYS, True))


def refused(directory: Path) -> set[str]:
    """The tensors that a plan refuses, each of them by its name."""
    try:
        plan_checkpoint(directory, engine=NEWEST)
    except PlanError as error:
        return {fault.where for fault in error.faults if fault.found.endswith("without an owner")}
    return set()


UNREAD = {
    "Cohere2ForCausalLM": {"attention_bias": True},
    "LagunaForCausalLM": {"attention_bias": True},
    "AfmoeForCausalLM": {"attention_bias": True},
    "NemotronHForCausalLM": {"use_bias": True, "mlp_bias": True},
    "GlmMoeDsaForCausalLM": {"attention_bias": True},
}
"""Classes with keys of config.json that give biases in transformers which the engine's class does not read."""


@pytest.mark.parametrize("name", UNREAD)
def test_a_bias_that_the_class_does_not_read_is_a_problem_since_the_model_needs_it(tmp_path: Path, name: str) -> None:
    """Its value changes the model in transformers, and nothing in the engine."""
    source, other = tmp_path / "a" / "in", tmp_path / "b" / "in"
    for directory, value in ((source, 0.5), (other, -0.25)):
        write_decoder(directory, name, {}, **UNREAD[name])
        rewrite_config(directory, lambda config: config.pop("quantization_config"))
        biases = biases_of(plan_checkpoint(directory, engine=NEWEST).problems)
        rewrite(directory, lambda stored, value=value, biases=biases: fill(stored, biases, value))

    assert differs(logits(source), logits(other))
    held = [values_held(convert(directory)) for directory in (source, other)]
    assert held[0] == held[1]
    assert plan_checkpoint(source, "dense").problems == ()


@pytest.mark.usefixtures("sidecar_cache")
def test_llm_refuses_what_the_class_would_misread(tmp_path: Path) -> None:
    """It would compute another model, without a word."""
    write_decoder(tmp_path, "Cohere2ForCausalLM", "fp8-channel-token", attention_bias=True)

    with engine_double.installed("newest", importers=[BINDINGS]):
        with pytest.raises(PlanError, match="builds these modules without one"):
            trtllm_ct.LLM(tmp_path, skip_tokenizer_init=True)
        with pytest.raises(PlanError, match="builds these modules without one"):
            trtllm_ct.prepare(tmp_path)


def biases_of(problems: tuple[Fault, ...]) -> list[str]:
    """The paths of the modules whose biases a problem names."""
    (fault,) = problems
    return fault.found.removeprefix("biases of ").partition(", which")[0].split(", ")


def fill(stored: dict[str, Tensor], paths: list[str], value: float) -> None:
    for name, tensor in stored.items():
        if any(name.endswith(f".{path}.bias") for path in paths):
            tensor.fill_(value)


def logits(directory: Path) -> Tensor:
    """Logits of transformers' own model, in float32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, **in_dtype(torch.float32))
    with torch.inference_mode():
        result: Tensor = model(torch.arange(2, 14)[None]).logits
    return result


def differs(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() > 1e-3 * first.abs().max())


MISSED = {
    "Qwen2MoeForCausalLM": ({"qkv_bias": False}, "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"),
    "GptOssForCausalLM": ({"attention_bias": False}, "self_attn"),
    "NemotronHForCausalLM": ({"use_conv_bias": False}, "mixer.conv1d"),
}
"""Classes that always build biases which transformers leaves out with these keys of config.json."""


@pytest.mark.parametrize("name", MISSED)
def test_a_bias_that_the_class_always_builds_is_missed_where_the_model_has_none(tmp_path: Path, name: str) -> None:
    """The engine stops while it loads such a model."""
    keys, paths = MISSED[name]
    plain(tmp_path / "in", name)
    rewrite_config(tmp_path / "in", lambda config: config.update(keys))
    rewrite(tmp_path / "in", without_biases_of_linears)

    (fault,) = plan_checkpoint(tmp_path / "in", engine=NEWEST).problems

    assert fault.found.startswith("none of")
    assert paths in fault.found
    assert plan_checkpoint(tmp_path / "in", "dense").problems == ()
    out = convert(tmp_path / "in")
    with pytest.raises(KeyError, match="bias"):
        values_held(out)


def without_biases_of_linears(stored: dict[str, Tensor]) -> None:
    ends = tuple(f"{leaf}.bias" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "conv1d"))
    for name in [name for name in stored if name.endswith(ends)]:
        stored.pop(name)


def test_layers_that_the_class_does_not_build_are_named(tmp_path: Path) -> None:
    """Mllama of the engine has neither cross-attention nor a tower."""
    plain(tmp_path, "MllamaForConditionalGeneration")

    (warning,) = (text for text in plan_checkpoint(tmp_path).warnings if "of the engine builds" in text)

    assert "no cross_attn and no vision_model" in warning
    assert not any("of the engine builds" in text for text in plan_checkpoint(tmp_path, "dense").warnings)


def test_a_tensor_that_no_part_of_the_class_has_is_named(tmp_path: Path) -> None:
    plain(tmp_path, "SeedOssForCausalLM")
    rewrite(tmp_path, lambda stored: stored.update({"model.layers.1.self_attn.other.weight": torch.zeros(3)}))

    plan = plan_checkpoint(tmp_path, engine=NEWEST)

    assert any("model.layers.1.self_attn.other.weight" in text for text in plan.warnings)
    assert plan.problems == ()


@pytest.mark.parametrize("built", [True, False])
def test_norms_that_config_json_turns_off_are_named(tmp_path: Path, built: bool) -> None:
    """GLM-4 MoE builds norms of heads by `use_qk_norm`; stored ones are read by nothing if it is false."""
    write_decoder(tmp_path, "Glm4MoeForCausalLM", "fp8-channel-token", use_qk_norm=True)
    rewrite_config(tmp_path, lambda config: config.update(use_qk_norm=built))

    warnings = [text for text in plan_checkpoint(tmp_path, engine=NEWEST).warnings if "drop them unseen" in text]

    assert ["q_norm" in text and "k_norm" in text for text in warnings] == ([] if built else [True])
