"""Models of any class become plain weights that transformers loads: exactly, and without a missing or unexpected key.

A fixed choice runs always, with what models differ in, and every class with a row in one scheme. `--every-class` adds
every class that generates text and that transformers builds from a tiny configuration:

    pytest tests/end_to_end/test_any_model.py --every-class -q

With `--tally docs/every-class.json` the outcomes are written to that file; docs/generate_every_class.py makes
docs/every-class.md from it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from any_model import SCHEMES, Outcome, has_stacks, quantize, taken_through
from builders import rewrite, rewrite_config
from safetensors.torch import load_file
from tally import noted
from tiny_classes import class_names, on_meta, tiny_model

from trtllm_ct.base.errors import PlanError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
from trtllm_ct.pipeline.transformers_class import TransformersClass
from trtllm_ct.plan.models import sites
from trtllm_ct.plan.models.class_rows import CLASS_ROWS
from trtllm_ct.plan.models.sites import Model
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Note = Callable[[str, object], None]

pytestmark = [pytest.mark.library, pytest.mark.reference]

EXACT = Outcome(result="exact")
CHOICE = {
    "CohereForCausalLM": "a head that is tied by the default of the class",
    "MptForCausalLM": "a part of the configuration without a model_type",
    "FalconForCausalLM": "layers called h, a fused q/k/v and word_embeddings",
    "Qwen3_5ForConditionalGeneration": "linear attention beside full attention, and a vision tower",
    "Idefics3ForConditionalGeneration": "a text model under a prefix of its own",
    "NemotronHForCausalLM": "layers of several kinds",
    "WhisperForConditionalGeneration": "encoder and decoder",
    "MusicFlamingoForConditionalGeneration": "a whole number that is stored as a float",
    "SegformerModel": "a list of numbers of heads",
    "DINOv3ViTModel": "a tensor without elements",
}
MIXTURES = {
    "Glm4MoeForCausalLM": "experts one by one",
    "MiniMaxM2ForCausalLM": "experts called w1, w2 and w3",
    "GraniteMoeHybridForCausalLM": "stacks that are modules beside the experts",
    "GptOssForCausalLM": "stacks of transposed experts with alternating rows and biases",
    "Llama4ForConditionalGeneration": "stacks of transposed experts in a wrapper",
    "Mistral4ForCausalLM": "stacks of experts",
    "HunYuanMoEV1ForCausalLM": "experts that the engine reads under other names than transformers",
    "DeepseekV4ForCausalLM": "ends of the decoder that the engine reads under other names than transformers",
    "OpenAIPrivacyFilterForTokenClassification": "stacks of transposed experts that do not alternate, with biases",
    "MuseSparkTextModel": "a norm beside the stacks",
    "MistralLarge4TextModel": "a learned tensor in the rotary embedding",
}


UNBUILT = frozenset(
    {
        *("ChameleonForConditionalGeneration", "DbrxForCausalLM", "Dots3NoteForConditionalGeneration"),
        *("Emu3ForConditionalGeneration", "Ernie4_5_VLMoeForConditionalGeneration", "FastVlmForConditionalGeneration"),
        *("Florence2ForConditionalGeneration", "Gemma3nForConditionalGeneration", "Gemma4AssistantForCausalLM"),
        *("Gemma4UnifiedAssistantForCausalLM", "Glm5NextForConditionalGeneration", "InklingForConditionalGeneration"),
        *("JanusForConditionalGeneration", "Molmo2ForConditionalGeneration", "MuseSparkForConditionalGeneration"),
        *("NemotronH_Omni_Reasoning_V3", "PerceptionLMForConditionalGeneration", "ZambaForCausalLM"),
    }
)
"""Classes that need another package or more than small sizes, or whose defaults leave them large."""

UNSAVED = frozenset(
    {
        ("Kimi_K25ForConditionalGeneration", "w4a16-g32"),
        ("MistralLarge4ForConditionalGeneration", "w4a16-g32"),
    }
)
"""Classes whose `save_pretrained` permutes rows of codes, and fails."""

REFUSED = {
    "HrmTextForCausalLM": "Without its scale",
    "MiniMaxM3SparseForConditionalGeneration": "Without its scale",
    "QianfanOCRForConditionalGeneration": "Without its scale",
    "Step3p7ForConditionalGeneration": "Its weight was lost or renamed",
    "UnlimitedOcrForConditionalGeneration": "Without its scale",
}
"""Classes whose `save_pretrained` renames weights and loses their FP8 scales."""


COPIED = frozenset({"GPT2LMHeadModel", "OpenAIGPTLMHeadModel"})
"""Classes whose layers are made of another module than Linear."""


@pytest.mark.newest_transformers  # models are saved as transformers 5 saves them
def test_a_model_loads_exactly(tmp_path: Path, name: str, scheme: str, record_property: Note) -> None:
    for stacked in (False, True) if has_stacks(tiny_model(name)) else (False,):
        source = quantize(tiny_model(name), tmp_path / f"source-{stacked}", scheme, stacked=stacked)

        outcome = taken_through(source, tmp_path / f"dense-{stacked}")

        record_property(*noted(name, scheme, outcome.result, outcome.why, tmp_path))
        refused = outcome.result in {"inspect", "refused"} and REFUSED[name] in outcome.why
        assert outcome == EXACT or refused or (name in COPIED and outcome.result == "copied")


@pytest.mark.newest_transformers
def test_a_class_that_is_left_out_has_no_tiny_model(
    tmp_path: Path, left_out: tuple[str, str], record_property: Note
) -> None:
    name, scheme = left_out
    try:
        model = tiny_model(name)
    except Exception as error:  # noqa: BLE001 (classes fail in their own ways)
        for each in SCHEMES:
            record_property(*noted(name, each, "not built", f"{type(error).__name__}: {error}", tmp_path))
        assert not scheme
        return
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the same)
        quantize(model, tmp_path / "source", scheme)
    record_property(*noted(name, scheme, "not saved", f"{type(caught.value).__name__}: {caught.value}", tmp_path))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "scheme" in metafunc.fixturenames:
        names: tuple[str, ...] = (*CHOICE, *MIXTURES)
        if metafunc.config.getoption("--every-class"):
            names = tuple(dict.fromkeys((*names, *(name for name in class_names() if name not in UNBUILT))))
        # Of every row: what the engine's class reads has no part in plain weights.
        built = set(class_names())
        rows = [(name, "fp8-dynamic") for name in CLASS_ROWS if name in built and name not in names]
        pairs = rows + [(name, scheme) for name in names for scheme in SCHEMES]
        metafunc.parametrize(("name", "scheme"), [pair for pair in pairs if pair not in UNSAVED])
    if "left_out" in metafunc.fixturenames:
        pairs = [*((name, "") for name in sorted(UNBUILT)), *sorted(UNSAVED)]
        every = metafunc.config.getoption("--every-class")
        metafunc.parametrize("left_out", pairs if every else [("ZambaForCausalLM", "")], ids="-".join)


ROWS = ("Glm4MoeForCausalLM", "MiniMaxM2ForCausalLM", "HunYuanMoEV1ForCausalLM", "DeepseekV4ForCausalLM")


@pytest.mark.newest_transformers
@pytest.mark.parametrize("name", ROWS)
def test_what_the_engine_reads_has_no_part_in_plain_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With any other names in the row of the class, `dense` has the same tensors."""
    quantize(tiny_model(name), tmp_path / "source", "fp8-dynamic")
    before = delivered(tmp_path / "source")
    row = replace(CLASS_ROWS[name], projections=("one", "two", "three"), embeddings="table", head="end")
    monkeypatch.setattr(sites, "CLASS_ROWS", {**CLASS_ROWS, name: row})

    assert delivered(tmp_path / "source") == before


def delivered(directory: Path) -> set[str]:
    plan = plan_checkpoint(directory, "dense")
    return {delivery.name for module in plan.modules for delivery in module.deliveries} | set(plan.stacks)


def mixtures() -> list[str]:
    """The rows of classes that transformers builds with stacks of experts, or with experts one by one."""
    return [name for name in CLASS_ROWS if name in set(class_names()) - UNBUILT and not CLASS_ROWS[name].leaves]


@pytest.mark.newest_transformers
@pytest.mark.parametrize("name", mixtures())
def test_the_tables_spell_experts_as_the_class_does(name: str) -> None:
    """So `dense` is the same without transformers."""
    model = on_meta(name)
    owners = [path for path, module in model.named_modules() if path.endswith(".experts") and has_stacks(module)]
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [name]}

    told = TransformersClass(config).expert_spelling(owners)

    assert not told.known or told.projections == Model.from_config(config).spelling.projections


@pytest.mark.newest_transformers
def test_without_transformers_the_tables_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = quantize(tiny_model("HunYuanMoEV1ForCausalLM"), tmp_path / "source", "fp8-dynamic", stacked=True)
    monkeypatch.setattr(TransformersClass, "_model", lambda _: (None, "transformers is not installed"))

    assert taken_through(source, tmp_path / "dense") == EXACT


@pytest.mark.newest_transformers
def test_a_spelling_that_is_not_known_is_told(tmp_path: Path) -> None:
    quantize(tiny_model("HunYuanMoEV1ForCausalLM"), tmp_path / "source", "fp8-dynamic")
    rewrite_config(
        tmp_path / "source", lambda config: config.update(architectures=["OtherForCausalLM"], model_type="other")
    )

    warnings = plan_checkpoint(tmp_path / "source", "dense").warnings

    assert any("how OtherForCausalLM reads routed experts is not known" in warning for warning in warnings)
    assert delivered(tmp_path / "source") >= {"model.layers.0.mlp.experts.0.gate_proj.weight"}


@pytest.mark.newest_transformers
def test_names_of_mistrals_own_form_in_another_class_are_names_like_others(tmp_path: Path) -> None:
    quantize(tiny_model("LlamaForCausalLM"), tmp_path / "source", "fp8-dynamic")
    leaves = {f"self_attn.{leaf}_proj": f"attention.w{leaf}" for leaf in "qkvo"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            new = name.removeprefix("model.")
            for old, leaf in leaves.items():
                new = new.replace(old, leaf)
            tensors[new] = tensors.pop(name)

    rewrite(tmp_path / "source", rename)
    rewrite_config(
        tmp_path / "source", lambda config: config.update(architectures=["OtherForCausalLM"], model_type="other")
    )

    convert_checkpoint(tmp_path / "source", tmp_path / "dense", to="dense")

    assert verify_checkpoint(tmp_path / "source", tmp_path / "dense").good


@pytest.mark.newest_transformers
def test_a_source_that_only_transformers_reads_is_verified(tmp_path: Path) -> None:
    """Its layers are called otherwise than the engine's class calls them."""
    quantize(tiny_model("DeepseekV4ForCausalLM"), tmp_path / "source", "fp8-dynamic")

    assert verify_checkpoint(tmp_path / "source").good


@pytest.mark.newest_transformers
def test_experts_without_weights_are_not_missed(tmp_path: Path) -> None:
    """The class has a place in one of its stacks for them, so transformers itself loads no such model."""
    quantize(tiny_model("LongcatFlashForCausalLM", zero_expert_num=2), tmp_path / "source", "fp8-dynamic")

    assert not inspect_checkpoint(tmp_path / "source", "dense").problems
    convert_checkpoint(tmp_path / "source", tmp_path / "dense", to="dense")
    assert verify_checkpoint(tmp_path / "source", tmp_path / "dense").good


@pytest.mark.newest_transformers
def test_a_learned_tensor_of_a_rotary_embedding_is_compared(tmp_path: Path) -> None:
    """Only its frequencies are computed from config.json."""
    quantize(tiny_model("MistralLarge4TextModel"), tmp_path / "source", "fp8-dynamic")
    convert_checkpoint(tmp_path / "source", tmp_path / "dense", to="dense")
    rewrite(tmp_path / "dense", lambda tensors: tensors.pop("rotary_emb.alpha"))

    report = verify_checkpoint(tmp_path / "source", tmp_path / "dense")

    assert any("rotary_emb.alpha" in str(fault) for fault in report.faults)


@pytest.mark.newest_transformers
@pytest.mark.parametrize(("tensor", "uneven"), [(4, []), (8, ["config.json: heads of q_proj"])])
def test_the_heads_of_every_layer_are_compared_with_the_ranks(tmp_path: Path, tensor: int, uneven: list[str]) -> None:
    """Rows of 12 heads can be divided by 8, heads can't."""
    heads = {"num_attention_heads": 8, "num_attention_heads_per_layer": [8, 12], "num_key_value_heads": 4}
    model = tiny_model("LagunaForCausalLM", head_dim=16, gating="per-element", **heads)
    quantize(model, tmp_path, "fp8-dynamic")

    problems = inspect_checkpoint(tmp_path, "modelopt", engine="stock-1.3", parallel=Parallel(tensor=tensor)).problems

    assert [problem.where for problem in problems] == uneven


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of five layers, the first of which has no experts."""
    directory = tmp_path_factory.mktemp("glm")
    model = tiny_model("Glm4MoeForCausalLM", num_hidden_layers=5, attention_bias=True)
    return quantize(model, directory, "w4a16-g32").directory


def copied(source: Path, out: Path) -> Path:
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


@pytest.mark.parametrize(
    "lost",
    ["model.layers.3.self_attn.o_proj", "model.layers.2.mlp.experts.1.up_proj", "model.layers.4.mlp.experts.2"],
)
def test_a_lost_module_is_named(glm: Path, tmp_path: Path, lost: str) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{lost}.")]:
            del tensors[name]

    damaged = copied(glm, tmp_path / "damaged")
    rewrite(damaged, lose)

    problems = inspect_checkpoint(damaged, "dense").problems

    assert problems
    assert all(fault.where.startswith(lost) and "No file is missing" in fault.remedy for fault in problems)


def test_a_checkpoint_of_an_unknown_class_is_verified(glm: Path, tmp_path: Path) -> None:
    source = copied(glm, tmp_path / "source")
    rewrite_config(source, lambda config: config.update(architectures=["OtherForCausalLM"]))

    assert verify_checkpoint(source).good


def test_a_lost_bias_is_named(glm: Path, tmp_path: Path) -> None:
    damaged = copied(glm, tmp_path / "damaged")
    rewrite(damaged, lambda tensors: tensors.pop("model.layers.3.self_attn.k_proj.bias"))

    (problem,) = inspect_checkpoint(damaged, "dense").problems

    assert problem.where == "model.layers.3.self_attn.k_proj.bias"


@pytest.mark.parametrize(
    "lost", ["model.norm", "lm_head", "model.layers.0.mlp.gate_proj", "model.layers.2.mlp.gate.e_score_correction_bias"]
)
def test_the_class_of_transformers_names_what_no_other_layer_has(glm: Path, tmp_path: Path, lost: str) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(lost)]:
            del tensors[name]

    damaged = copied(glm, tmp_path / "damaged")
    rewrite(damaged, lose)

    (problem,) = inspect_checkpoint(damaged, "dense").problems

    assert problem.where.startswith(lost)
    with pytest.raises(PlanError, match=re.escape(lost)):
        convert_checkpoint(damaged, tmp_path / "out", to="dense")


def test_all_that_layers_and_class_find_is_reported_at_once(glm: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.3.input_layernorm.weight"]
        tensors["model.layers.2.self_attn.q_proj.bias"] = tensors["model.layers.2.self_attn.q_proj.bias"][:-1].clone()

    damaged = copied(glm, tmp_path / "damaged")
    rewrite(damaged, damage)

    problems = {fault.where for fault in inspect_checkpoint(damaged, "dense").problems}

    assert problems == {
        "model.norm.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.2.self_attn.q_proj.bias",
    }


@pytest.mark.parametrize("target", ["dense", "modelopt"])
def test_the_checks_that_ran_are_listed(glm: Path, target: str) -> None:
    checks = {check.name: check for check in plan_checkpoint(glm, target).checks}

    assert checks.keys() == {"files", "codes", "layers", "class"}
    assert all(check.ran for check in checks.values())
    assert checks["class"].detail.startswith("Glm4MoeForCausalLM of transformers")


def test_loading_compares_with_no_class(glm: Path) -> None:
    """Importing transformers takes longer than planning."""
    check = open_checkpoint(glm).plan("dense").checks[-1]

    assert (check.name, check.ran) == ("class", False)


@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_is_delivered_whatever_the_class_ties(
    glm: Path, tmp_path: Path, stated: bool | None, equal: bool
) -> None:
    def state(config: dict[str, Any]) -> None:
        config.pop("tie_word_embeddings", None)
        config |= {} if stated is None else {"tie_word_embeddings": stated}

    def store(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = table.clone() if equal else -table

    source = copied(glm, tmp_path / "source")
    rewrite_config(source, state)
    rewrite(source, store)

    convert_checkpoint(source, tmp_path / "dense", to="dense")

    config = json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert "lm_head.weight" in tensors
    # The row of this class says that its head is its own, if config.json says nothing.
    assert config.get("tie_word_embeddings") is (bool(stated) and equal)
    assert verify_checkpoint(source, tmp_path / "dense").good


@pytest.mark.parametrize("known", [True, False])
def test_without_a_stored_head_the_class_decides_on_the_tie(glm: Path, tmp_path: Path, known: bool) -> None:
    """The default of this class is a head of its own, so it is lost; that of a class that is not known may be a tie."""

    def state(config: dict[str, Any]) -> None:
        del config["tie_word_embeddings"]
        config["architectures"] = config["architectures"] if known else ["OtherForCausalLM"]

    source = copied(glm, tmp_path / "source")
    rewrite_config(source, state)
    rewrite(source, lambda tensors: tensors.pop("lm_head.weight"))

    if known:
        with pytest.raises(PlanError, match=r"lm_head\.weight"):
            convert_checkpoint(source, tmp_path / "dense", to="dense")
        return
    convert_checkpoint(source, tmp_path / "dense", to="dense")

    assert "tie_word_embeddings" not in json.loads((tmp_path / "dense" / "config.json").read_text(encoding="utf-8"))


def test_a_checkpoint_that_holds_nothing_quantized_is_copied(glm: Path, tmp_path: Path) -> None:
    convert_checkpoint(glm, tmp_path / "plain", to="dense")
    block = open_checkpoint(glm).detection.block
    rewrite_config(tmp_path / "plain", lambda config: config.update(quantization_config=dict(block or {})))

    report = convert_checkpoint(tmp_path / "plain", tmp_path / "copy", to="dense")

    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "copy"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any("nothing is quantized" in warning for warning in report.plan.warnings)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_checkpoint_without_a_quantization_block_is_copied(tmp_path: Path, name: str) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "plain")

    found = inspect_checkpoint(tmp_path / "plain", "dense")
    convert_checkpoint(tmp_path / "plain", tmp_path / "copy", to="dense")

    assert not found.problems
    assert found.detection.method is None
    assert any("nothing is quantized" in warning for warning in found.warnings)
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "copy"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert verify_checkpoint(tmp_path / "plain").good
    assert verify_checkpoint(tmp_path / "plain", tmp_path / "copy").good


def test_codes_without_a_quantization_block_are_refused(glm: Path, tmp_path: Path) -> None:
    source = copied(glm, tmp_path / "source")
    rewrite_config(source, lambda config: config.pop("quantization_config"))

    (problem,) = inspect_checkpoint(source, "dense").problems

    assert problem.where == "config.json: quantization_config"
    assert "published" in problem.remedy
