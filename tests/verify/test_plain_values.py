"""`verify` warns of every plain tensor that holds NaN or an infinity, and names the first such element."""

from __future__ import annotations

from math import inf, nan
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import rewrite, tiny_config, write_checkpoint
from command_line import run_cli
from fused_experts import fuse_experts

from trtllm_ct.verify import plain_values
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

NORM, BIAS, HEAD = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.weight"


def set_last(tensor: torch.Tensor, value: float) -> str:
    """Set the last element of a tensor, and return its index as warnings show it."""
    tensor[tuple(size - 1 for size in tensor.shape)] = value
    return str([size - 1 for size in tensor.shape])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [nan, -nan, inf, -inf])
@pytest.mark.parametrize("name", [NORM, BIAS, HEAD])
def test_the_tensor_and_its_first_bad_element_are_named(tmp_path: Path, name: str, value: float, dtype: str) -> None:
    config = tiny_config("Qwen2ForCausalLM", layers=1, dtype=dtype, tie_word_embeddings=False)
    built = write_checkpoint(tmp_path, config=config, scheme="int4-g32")
    places: list[str] = []
    rewrite(tmp_path, lambda stored: places.append(set_last(stored[name], value)))

    report = verify_checkpoint(tmp_path)

    assert report.good
    count = built.stored[name].numel()
    word = str(value).removeprefix("-") if value != value else str(value)  # noqa: PLR0124
    share = f"1 of {count} elements are NaN or infinite"
    assert [warning for warning in report.warnings if " is " in warning and "elements" in warning] == [
        f"{name}{places[0]} is {word} ({share}), so that the model may compute NaN"
    ]


@pytest.mark.parametrize(
    ("architecture", "scheme", "edit"),
    [
        ("Qwen2ForCausalLM", "int4-g32", None),
        ("Qwen3MoeForCausalLM", "int4-g32", None),
        ("Qwen3MoeForCausalLM", "dense", None),
        ("Qwen3MoeForCausalLM", "dense", fuse_experts),
    ],
)
def test_every_plain_tensor_is_read(
    tmp_path: Path, architecture: str, scheme: str, edit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, also a stack that all experts of a layer have a part of."""
    monkeypatch.setattr(plain_values, "_MOST_NAMED", 1000)
    monkeypatch.setattr(plain_values, "_CHUNK_BYTES", 1 << 8)
    write_checkpoint(tmp_path, config=tiny_config(architecture), scheme=scheme, edit=edit)
    changed: list[str] = []

    def damage(stored: dict[str, Any]) -> None:
        for name, tensor in stored.items():
            if tensor.dtype is torch.bfloat16 and not name.endswith("_scale"):
                changed.append(name + set_last(tensor, nan))

    rewrite(tmp_path, damage)

    report = verify_checkpoint(tmp_path)

    assert report.good
    named = [warning.partition(" is nan")[0] for warning in report.warnings if " is nan" in warning]
    assert sorted(named) == sorted(changed)


def test_the_largest_numbers_are_numbers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config=tiny_config(layers=1), scheme="int4-g32")
    rewrite(tmp_path, lambda stored: stored[NORM].fill_(-torch.finfo(torch.bfloat16).max))

    assert verify_checkpoint(tmp_path).warnings == ()


def test_of_very_many_tensors_the_first_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config=tiny_config(layers=6), scheme="int4-g32")

    def damage(stored: dict[str, Any]) -> None:
        for name, tensor in stored.items():
            if "layernorm" in name:
                tensor.fill_(inf)

    rewrite(tmp_path, damage)

    *named, others = verify_checkpoint(tmp_path).warnings

    assert len(named) == 5
    assert others == "7 more plain tensors hold numbers that are not finite"


@pytest.mark.reference
def test_what_generate_stumbles_over_verify_names(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_checkpoint(source, config=tiny_config(vocabulary=300), scheme="int4-g32", tokenizer=True)
    rewrite(source, lambda stored: stored[NORM].fill_(nan))
    stopped = run_cli("generate", source, "--prompt", "the import")
    assert stopped.code == 1
    assert "Run `trtllm-ct verify` on the checkpoint" in stopped.err_words

    found = run_cli("verify", source)
    document = run_cli("verify", source, "--json").document

    assert found.code == 0
    assert f"{NORM}[0] is nan" in found.out
    assert [warning.startswith(f"{NORM}[0] is nan") for warning in document["warnings"]] == [True]
