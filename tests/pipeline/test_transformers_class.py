"""A checkpoint fits the class of transformers that config.json names, or the comparison says where it doesn't."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from trtllm_ct.base.packages import Package
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.pipeline.transformers_class import TransformersClass

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.models.plain_tensors import PlainTensors

pytestmark = [pytest.mark.reference, pytest.mark.newest_transformers]

GLM = "Glm4MoeForCausalLM"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture as transformers saves it: experts one by one, although the class stacks them."""
    from tiny_classes import tiny_model

    directory = tmp_path_factory.mktemp("saved")
    tiny_model(GLM, num_hidden_layers=3).save_pretrained(directory)
    return directory


def config_of(directory: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return document


def tensors_of(directory: Path) -> PlainTensors:
    return {name: tensor.spec.shape for name, tensor in Catalog.from_directory(directory).tensors.items()}


def test_what_transformers_saves_fits(saved: Path) -> None:
    comparison = TransformersClass(config_of(saved)).compare(tensors_of(saved))

    assert comparison.by.startswith(f"{GLM} of transformers 5")
    assert (comparison.missing, comparison.misfits, comparison.unread) == ({}, (), frozenset())
    assert "model.layers.2.mlp.experts.gate_up_proj" in comparison.present


@pytest.mark.parametrize(
    "lost", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
)
def test_a_lost_tensor_is_missing(saved: Path, lost: str) -> None:
    tensors = tensors_of(saved)
    shape = tensors.pop(lost)

    assert TransformersClass(config_of(saved)).compare(tensors).missing == {lost: shape}


def test_a_tied_head_need_not_be_stored(saved: Path) -> None:
    tensors = tensors_of(saved)
    del tensors["lm_head.weight"]

    assert not TransformersClass(config_of(saved) | {"tie_word_embeddings": True}).compare(tensors).missing


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight"]
)
def test_a_tensor_of_another_size_is_a_misfit(saved: Path, name: str) -> None:
    tensors = tensors_of(saved)
    tensors[name] = (3, 64)

    (misfit,) = TransformersClass(config_of(saved)).compare(tensors).misfits

    assert name in misfit.sources


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight"]
)
def test_a_tensor_without_a_known_shape_is_present(saved: Path, name: str) -> None:
    comparison = TransformersClass(config_of(saved)).compare({**tensors_of(saved), name: None})

    assert (comparison.missing, comparison.misfits) == ({}, ())


def test_tensors_of_draft_layers_are_unread_and_no_fault(saved: Path) -> None:
    drafts: PlainTensors = {"model.layers.3.eh_proj.weight": (64, 128), "mtp.layers.0.norm.weight": (64,)}

    comparison = TransformersClass(config_of(saved)).compare({**tensors_of(saved), **drafts})

    assert (comparison.missing, comparison.misfits) == ({}, ())
    assert comparison.unread <= drafts.keys()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"architectures": ["NoSuchForCausalLM"]}, "has no class NoSuchForCausalLM"),
        ({"architectures": ["logging"]}, "has no class logging"),
        ({"architectures": []}, "names no class"),
        ({"model_type": "llama"}, f"has no class {GLM}"),
        ({"hidden_size": "many"}, f"{GLM} of transformers 5"),
        ({"num_attention_heads": 0}, "was not built"),
    ],
)
def test_a_class_that_is_not_built_is_no_fault(saved: Path, change: dict[str, Any], why: str) -> None:
    comparison = TransformersClass(config_of(saved) | change).compare(tensors_of(saved))

    assert why in comparison.why_not
    assert (comparison.by, comparison.missing, comparison.misfits) == ("", {}, ())


def test_without_transformers_nothing_is_compared(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "installed", property(lambda _: False))

    assert TransformersClass(config_of(saved)).compare({}).why_not == "transformers is not installed"


def test_neither_code_of_the_checkpoint_nor_the_network_is_used(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something was fetched")

    (tmp_path / "evil.py").write_text("raise AssertionError('code of the checkpoint ran')")
    config = config_of(saved) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "_name_or_path": str(tmp_path)}
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)

    assert TransformersClass(config).compare(tensors_of(saved)).by


def test_infinity_in_config_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    from tiny_classes import tiny_model

    tiny_model("NemotronHForCausalLM").save_pretrained(tmp_path)
    config = config_of(tmp_path)

    assert TransformersClass(config | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}).compare({}).by
