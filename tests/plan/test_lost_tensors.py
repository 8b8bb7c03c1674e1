"""What layers and class say about lost tensors becomes faults, each once, and the class decides where both speak."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import rewrite, write_checkpoint
from tiny_models import tiny_config

from trtllm_ct.base.errors import FaultCollector, PlanError
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan.checks import checks_of, checks_text
from trtllm_ct.plan.lost_tensors import NOT_ASKED, class_warnings, refuse_lost_tensors
from trtllm_ct.plan.models.expert_spellings import spelling_of
from trtllm_ct.plan.models.model_class import Comparison, Misfit, ModelClass
from trtllm_ct.plan.models.plain_tensors import PlainTensors, as_class_spells
from trtllm_ct.plan.models.sites import Model

if TYPE_CHECKING:
    from pathlib import Path

MODEL = Model.from_config({"architectures": ["NewForCausalLM"], "num_hidden_layers": 5, "hidden_size": 8})
LAYER: PlainTensors = {"attn.weight": (8, 8), "mlp.weight": (16, 8), "norm.weight": (8,)}
TENSORS: PlainTensors = {
    "model.embed_tokens.weight": (32, 8),
    **{f"model.layers.{layer}.{name}": shape for layer in range(5) for name, shape in LAYER.items()},
    "model.norm.weight": (8,),
}


class Exactly(ModelClass):
    """A class with these parameters, under the names of the files."""

    def __init__(self, parameters: PlainTensors, part: str = "") -> None:
        self.parameters = parameters
        self.part = part
        self.text = frozenset(name for name in parameters if not part or not name.startswith((part, "projector")))

    def compare(self, tensors: PlainTensors) -> Comparison:
        present = self.parameters.keys() & tensors.keys()
        wrong = [name for name in sorted(present) if tensors[name] not in (None, self.parameters[name])]
        return Comparison(
            by="the class",
            missing={name: shape or () for name, shape in self.parameters.items() if name not in tensors},
            present=frozenset(present),
            misfits=tuple(
                Misfit(name=name, sources=(name,), expected=self.parameters[name] or (), found=str(tensors[name]))
                for name in wrong
            ),
            unread=frozenset(tensors.keys() - self.parameters.keys()),
            parts={self.part: frozenset(name for name in self.parameters if name.startswith(self.part))}
            if self.part
            else {},
            text=self.text,
        )


class NotBuilt(ModelClass):
    def compare(self, tensors: PlainTensors) -> Comparison:
        return Comparison(why_not="it is not installed")


def faults_of(tensors: PlainTensors, model_class: ModelClass | None) -> list[str]:
    faults = FaultCollector()
    refuse_lost_tensors(tensors, MODEL, "model.", model_class, faults)
    return [fault.where for fault in faults.faults]


def without(*names: str) -> PlainTensors:
    return {name: shape for name, shape in TENSORS.items() if not name.startswith(names)}


@pytest.mark.parametrize("model_class", [None, NotBuilt(), Exactly(TENSORS)])
def test_a_complete_checkpoint_has_no_fault(model_class: ModelClass | None) -> None:
    assert not faults_of(TENSORS, model_class)


@pytest.mark.parametrize("model_class", [None, NotBuilt(), Exactly(TENSORS)])
@pytest.mark.parametrize("lost", ["model.layers.3.attn.weight", "model.layers.2", "model.layers.4"])
def test_what_layers_and_class_miss_is_one_fault(model_class: ModelClass | None, lost: str) -> None:
    assert faults_of(without(lost), model_class) == [lost]


@pytest.mark.parametrize("model_class", [None, NotBuilt(), Exactly(TENSORS)])
def test_a_size_that_layers_and_class_contradict_is_one_fault(model_class: ModelClass | None) -> None:
    name = "model.layers.3.mlp.weight"

    assert faults_of({**TENSORS, name: (15, 8)}, model_class) == [name]


def test_only_the_class_misses_what_is_in_no_layer() -> None:
    assert not faults_of(without("model.norm"), None)
    assert faults_of(without("model.norm", "model.layers.1.norm"), Exactly(TENSORS)) == [
        "model.layers.1.norm.weight",
        "model.norm.weight",
    ]


def test_a_layer_that_is_another_in_the_class_has_lost_nothing() -> None:
    """Its layers may share keys and values, for example."""
    stored = without("model.layers.3.attn")
    larger: PlainTensors = {**TENSORS, "model.layers.3.mlp.weight": (15, 8)}

    assert not faults_of(stored, Exactly(stored))
    assert not faults_of(larger, Exactly(larger))


def test_unread_tensors_are_no_fault() -> None:
    assert not faults_of(
        {**TENSORS, "mtp.layers.0.weight": (8, 8), "model.layers.5.eh_proj.weight": (8, 16)}, Exactly(TENSORS)
    )


def test_a_tensor_under_another_name_is_a_warning() -> None:
    renamed: PlainTensors = {**without("model.norm"), "model.final_norm.weight": (8,)}
    faults = FaultCollector()

    comparison = refuse_lost_tensors(renamed, MODEL, "model.", Exactly(TENSORS), faults)

    assert not faults.faults
    (warning,) = class_warnings(comparison)
    assert "model.norm.weight" in warning
    assert "model.final_norm.weight" in warning


def test_a_tensor_of_the_same_shape_is_no_other_name() -> None:
    stored: PlainTensors = {**without("model.norm"), "model.extra.weight": (8,)}

    assert faults_of(stored, Exactly(TENSORS)) == ["model.norm.weight"]


def test_one_tensor_is_the_other_name_of_one() -> None:
    larger: PlainTensors = {**TENSORS, "model.other_norm.weight": (8,)}
    stored: PlainTensors = {**without("model.norm"), "model.last_norm.weight": (8,)}

    assert len(faults_of(stored, Exactly(larger))) == 1


def test_the_names_of_a_class_with_a_row_are_known() -> None:
    model = Model.from_config({"architectures": ["SeedOssForCausalLM"], "num_hidden_layers": 5, "hidden_size": 8})
    stored: PlainTensors = {**without("model.norm"), "model.final_norm.weight": (8,)}
    faults = FaultCollector()

    refuse_lost_tensors(stored, model, "model.", Exactly(TENSORS), faults)

    assert [fault.where for fault in faults.faults] == ["model.norm.weight"]


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("model_class", [None, NotBuilt(), Exactly(TENSORS), Exactly(TENSORS, "visual")])
def test_most_of_a_text_model_is_never_absent(model_class: ModelClass | None, kept: int) -> None:
    gone = tuple(f"model.layers.{layer}." for layer in range(kept, 5))

    assert faults_of(without(*gone), model_class) == [name.rstrip(".") for name in gone]


def test_a_projector_is_absent_with_its_tower_only() -> None:
    tower: PlainTensors = {f"visual.blocks.{block}.weight": (4, 4) for block in range(6)}
    projector: PlainTensors = {"projector.inner.weight": (4, 8)}
    whole = Exactly({**TENSORS, **tower, **projector}, "visual")

    assert not faults_of(TENSORS, whole)
    assert faults_of({**TENSORS, **tower}, whole) == ["projector.inner.weight"]
    assert "model.norm.weight" in faults_of(without("model.norm"), whole)


def test_files_with_other_names_throughout_are_not_compared_with_the_class() -> None:
    other = {name.replace("model.", "net."): shape for name, shape in TENSORS.items()}
    faults = FaultCollector()

    comparison = refuse_lost_tensors(other, MODEL, "net.", Exactly(TENSORS), faults)

    assert not faults.faults
    assert "other names" in comparison.why_not


def test_layers_that_the_class_reads_are_not_too_many() -> None:
    """A codec has blocks beside those that config.json counts."""
    more: PlainTensors = {f"model.layers.{layer}.{name}": shape for layer in (5, 6) for name, shape in LAYER.items()}
    stored: PlainTensors = {**TENSORS, **more}

    assert faults_of(stored, None) == ["model.layers.5", "model.layers.6"]
    assert faults_of(stored, Exactly(TENSORS)) == ["model.layers.5", "model.layers.6"]
    assert not faults_of(stored, Exactly(stored))


def test_a_draft_layer_is_no_other_name_of_a_lost_tensor() -> None:
    stored: PlainTensors = {
        **without("model.norm"),
        "mtp.layers.0.norm.weight": (8,),
        "model.layers.5.hnorm.weight": (8,),
    }

    assert faults_of(stored, Exactly(TENSORS)) == ["model.norm.weight"]


@pytest.mark.parametrize("kept", [0, 1])
def test_a_part_that_is_not_stored_is_a_warning(kept: int) -> None:
    tower: PlainTensors = {f"visual.blocks.{block}.weight": (4, 4) for block in range(6)}
    stub: PlainTensors = dict(list(tower.items())[:kept])
    faults = FaultCollector()

    comparison = refuse_lost_tensors(
        {**TENSORS, **stub}, MODEL, "model.", Exactly({**TENSORS, **tower}, "visual"), faults
    )

    assert not faults.faults
    assert "visual" in class_warnings(comparison)[0]


def test_a_lost_tensor_of_a_tower_is_a_fault() -> None:
    tower: PlainTensors = {f"visual.blocks.{block}.weight": (4, 4) for block in range(6)}
    stored = {name: shape for name, shape in {**TENSORS, **tower}.items() if name != "visual.blocks.4.weight"}

    assert faults_of(stored, Exactly({**TENSORS, **tower}, "visual")) == ["visual.blocks.4.weight"]


def test_the_line_says_which_checks_ran() -> None:
    ran = checks_text(checks_of(MODEL, Comparison(by="NewForCausalLM of a library")))
    left_out = checks_text(checks_of(MODEL, NOT_ASKED))

    assert ran.endswith("NewForCausalLM of a library")
    assert left_out.endswith(f"not its class: {NOT_ASKED.why_not}")
    assert "modules listed for" in checks_text(checks_of(Model.from_config(tiny_config()), NOT_ASKED))


EXPERTS: PlainTensors = {
    f"m.experts.{number}.{name}.weight": (12, 8) if name != "down_proj" else (8, 12)
    for number in range(3)
    for name in ("gate_proj", "up_proj", "down_proj")
}


def test_experts_are_spelled_as_their_class_reads_them() -> None:
    assert as_class_spells(EXPERTS, spelling_of("glm4_moe")) == EXPERTS
    assert "m.experts.2.w3.weight" in as_class_spells(EXPERTS, spelling_of("minimax_m2"))
    assert as_class_spells(EXPERTS, spelling_of("mistral4")) == {
        "m.experts.gate_up_proj": (3, 24, 8),
        "m.experts.down_proj": (3, 8, 12),
    }
    assert as_class_spells(EXPERTS, spelling_of("llama4_text"))["m.experts.gate_up_proj"] == (3, 8, 24)


def test_a_stack_of_unlike_experts_has_no_known_shape() -> None:
    unlike: PlainTensors = {**EXPERTS, "m.experts.1.up_proj.weight": (11, 8)}

    assert as_class_spells(unlike, spelling_of("mistral4"))["m.experts.gate_up_proj"] is None
    del unlike["m.experts.1.up_proj.weight"]
    assert as_class_spells(unlike, spelling_of("mistral4")) == unlike


SAVED_WITHOUT = "No file is missing, so the checkpoint was saved without it: quantize the model again"
FETCH = "Fetch the shard that holds it from where the checkpoint was published"


@pytest.mark.parametrize(
    ("shards", "rename", "remedy"),
    [
        (1, {}, SAVED_WITHOUT),
        (3, {}, SAVED_WITHOUT),
        (3, {"model.safetensors.index.json": ""}, SAVED_WITHOUT),
        (1, {"model.safetensors": "other.safetensors"}, FETCH),
    ],
    ids=["one file", "an index", "numbered files", "a file of any name"],
)
@pytest.mark.parametrize(
    "lost",
    [
        "model.layers.1.mlp.up_proj.weight_scale",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.k_scale",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_lost_tensor_is_in_a_missing_file_only_if_one_can_be_missing(
    tmp_path: Path, shards: int, rename: dict[str, str], remedy: str, lost: str
) -> None:
    """`save_pretrained` drops the scales of some models: there is nothing to fetch then."""
    write_checkpoint(tmp_path, scheme="fp8-channel-token", kv=True, shards=shards)
    rewrite(tmp_path, lambda stored: stored.pop(lost))
    for name, other in rename.items():
        (tmp_path / name).rename(tmp_path / other) if other else (tmp_path / name).unlink()

    with pytest.raises(PlanError) as caught:
        plan_checkpoint(tmp_path)

    remedies = {fault.where: fault.remedy for fault in caught.value.faults}
    assert remedy in remedies.pop(lost)
    assert all(remedy in other for other in remedies.values())


@pytest.mark.parametrize(("file", "remedy"), [("model.safetensors", SAVED_WITHOUT), ("other.safetensors", FETCH)])
@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.", "model.norm.weight"])
def test_the_same_holds_for_models_whose_row_lists_no_modules(
    tmp_path: Path, lost: str, file: str, remedy: str
) -> None:
    write_checkpoint(tmp_path, scheme="fp8-channel-token", config=tiny_config(architectures=["SeedOssForCausalLM"]))
    rewrite(tmp_path, lambda stored: [stored.pop(name) for name in [*stored] if name.startswith(lost)])
    (tmp_path / "model.safetensors").rename(tmp_path / file)

    with pytest.raises(PlanError) as caught:
        plan_checkpoint(tmp_path)

    assert all(remedy in fault.remedy for fault in caught.value.faults)
