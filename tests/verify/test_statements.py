"""Statements of a converted directory's configuration that would lose tensors whose values are right."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import fp8_weights, rewrite, rewrite_config, tiny_config, write_checkpoint
from decoder_models import write_decoder
from multimodal import write_multimodal

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trtllm_ct.base.errors import Fault

CONFIG = tiny_config(hidden=256, intermediate=256)


def faults(root: Path) -> tuple[Fault, ...]:
    return verify_checkpoint(root / "in", root / "out").faults


def convert(root: Path, to: str = "modelopt") -> None:
    convert_checkpoint(root / "in", root / "out", to=to)
    assert faults(root) == ()


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


# Ties.


@pytest.mark.parametrize("to", ["modelopt", "dense"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "SeedOssForCausalLM"])
def test_a_tie_that_would_drop_a_head_is_found(tmp_path: Path, architecture: str, to: str) -> None:
    if architecture == "LlamaForCausalLM":
        write_checkpoint(tmp_path / "in", config=CONFIG, scheme="fp8-channel-token")
    else:
        write_decoder(tmp_path / "in", architecture, "fp8-channel-token")
    convert(tmp_path, to)

    change(tmp_path / "out" / "config.json", lambda config: config.update(tie_word_embeddings=True))

    (fault,) = faults(tmp_path)
    assert fault.where.endswith("config.json: tie_word_embeddings")
    assert "lm_head differs from model.embed_tokens" in fault.expected


@pytest.mark.parametrize("level", ["top", "text_config"])
def test_both_levels_of_a_larger_model_count(tmp_path: Path, level: str) -> None:
    write_multimodal(tmp_path / "in", "model.language_model.", architecture="Mistral3ForConditionalGeneration")
    convert(tmp_path)

    def tie(config: dict[str, Any]) -> None:
        (config if level == "top" else config["text_config"])["tie_word_embeddings"] = True

    change(tmp_path / "out" / "config.json", tie)

    assert [fault.where.rpartition(": ")[2] for fault in faults(tmp_path)] == ["tie_word_embeddings"]


@pytest.mark.parametrize(("row", "element"), [(0, 0), (95, 255), (40, 17)])
def test_one_element_of_a_tied_head_that_differs_is_enough(tmp_path: Path, row: int, element: int) -> None:
    """A head that equals the table is none that is lost."""
    config = tiny_config(hidden=256, intermediate=256, vocabulary=96)

    def equal(stored: dict[str, torch.Tensor]) -> None:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()

    write_checkpoint(tmp_path / "in", config=config, scheme="fp8-channel-token", edit=equal)
    convert(tmp_path)
    change(tmp_path / "out" / "config.json", lambda config: config.update(tie_word_embeddings=True))
    assert faults(tmp_path) == ()

    for part in ("in", "out"):
        rewrite(
            tmp_path / part,
            lambda stored: stored["lm_head.weight"].view(torch.int16)[row, element].bitwise_xor_(1),
        )

    assert [fault.where.rpartition(": ")[2] for fault in faults(tmp_path)] == ["tie_word_embeddings"]


# The KV cache.


@pytest.mark.parametrize("lost", ["k", "v"])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_lost_scale_of_the_cache_is_named(tmp_path: Path, heads: int, lost: str) -> None:
    def widen(stored: dict[str, torch.Tensor]) -> None:
        names = [name for name in stored if name.endswith(("self_attn.k_scale", "self_attn.v_scale"))]
        stored.update({name: torch.linspace(0.25, 0.5, heads) for name in names})

    write_checkpoint(tmp_path / "in", config=CONFIG, scheme="fp8-channel-token", kv=True, edit=widen)
    if heads > 1:
        scheme = fp8_weights("attn_head")
        rewrite_config(tmp_path / "in", lambda config: config["quantization_config"].update(kv_cache_scheme=scheme))
    convert(tmp_path)
    name = f"model.layers.0.self_attn.{lost}_proj.{lost}_scale"

    rewrite(tmp_path / "out", lambda stored: stored.pop(name))

    assert [fault.where for fault in faults(tmp_path)] == [name]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stated", [None, "INT8", "NVFP4"])
def test_the_cache_must_be_that_of_the_source(tmp_path: Path, stated: str | None, dynamic: bool) -> None:
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme="fp8-channel-token", kv=not dynamic)
    if dynamic:
        scheme = fp8_weights("tensor", dynamic=True)
        rewrite_config(tmp_path / "in", lambda config: config["quantization_config"].update(kv_cache_scheme=scheme))
    convert(tmp_path)

    change(
        tmp_path / "out" / "hf_quant_config.json",
        lambda document: document["quantization"].update(kv_cache_quant_algo=stated),
    )

    (fault,) = faults(tmp_path)
    assert fault.where.endswith("hf_quant_config.json: kv_cache_quant_algo")
    assert fault.expected.startswith("FP8")


def test_a_cache_that_no_scheme_asks_for_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme="fp8-channel-token")
    convert(tmp_path)

    change(
        tmp_path / "out" / "hf_quant_config.json",
        lambda document: document["quantization"].update(kv_cache_quant_algo="FP8"),
    )

    (fault,) = faults(tmp_path)
    assert (fault.expected.partition(",")[0], fault.found) == ("none", "FP8")


@pytest.mark.parametrize("stated", [None, "INT8"])
def test_an_engine_build_checkpoint_states_the_cache_of_the_source(tmp_path: Path, stated: str | None) -> None:
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme="fp8-tensor-static", kv=True)
    convert(tmp_path, "engine")

    change(
        tmp_path / "out" / "config.json",
        lambda document: document["quantization"].update(kv_cache_quant_algo=stated),
    )

    assert "config.json: kv_cache_quant_algo" in [fault.where for fault in faults(tmp_path)]


@pytest.mark.parametrize("key", ["kv_cache_quant_algo", "quantized_layers"])
def test_the_file_for_older_releases_says_the_same(tmp_path: Path, key: str) -> None:
    scheme = {"o_proj": "int4-g64", "down_proj": "fp8-channel-token"}
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme=scheme, kv=True)
    convert(tmp_path)

    change(tmp_path / "out" / "quant_cfg.json", lambda document: document.pop(key))

    (fault,) = faults(tmp_path)
    assert fault.where.endswith(f"quant_cfg.json: {key}")


# The names that a class reads.


def renamed_in(root: Path, old: str, new: str) -> None:
    def rename(stored: dict[str, torch.Tensor]) -> None:
        for name in [name for name in stored if name.startswith(old)]:
            stored[new + name.removeprefix(old)] = stored.pop(name)

    rewrite(root / "out", rename)


@pytest.mark.parametrize(
    ("architecture", "old", "new"),
    [
        ("Mistral3ForConditionalGeneration", "language_model.model.", "model.language_model."),
        ("Gemma3ForConditionalGeneration", "language_model.model.", "model."),
        ("Mistral3ForConditionalGeneration", "language_model.lm_head", "lm_head"),
        ("Gemma3ForConditionalGeneration", "vision_tower.", "model.vision_tower."),
        ("Qwen3VLForConditionalGeneration", "model.language_model.", "language_model.model."),
        ("KimiK25ForConditionalGeneration", "language_model.model.", "model.language_model."),
    ],
)
def test_a_prefix_that_the_class_drops_is_found(tmp_path: Path, architecture: str, old: str, new: str) -> None:
    body = "model.language_model." if old == "model.language_model." else "language_model.model."
    write_multimodal(tmp_path / "in", body, architecture=architecture, scheme="fp8-channel-token")
    convert(tmp_path)

    renamed_in(tmp_path, old, new)

    told = [fault for fault in faults(tmp_path) if "as the class of this model reads it" in fault.expected]
    assert [fault.found for fault in told] == [f"one with {new}"]
    assert old in told[0].expected


def test_a_class_that_reads_several_prefixes_may_have_any_of_them(tmp_path: Path) -> None:
    write_multimodal(
        tmp_path / "in", "model.", architecture="Qwen3VLForConditionalGeneration", scheme="fp8-channel-token"
    )

    convert(tmp_path)


@pytest.mark.parametrize("to", ["modelopt", "dense"])
@pytest.mark.parametrize(
    ("old", "new"), [("model.", ""), ("model.", "model.language_model."), ("lm_head", "language_model.lm_head")]
)
def test_a_text_model_keeps_the_prefix_of_the_source(tmp_path: Path, to: str, old: str, new: str) -> None:
    """Engines read the modules of a class by their full names."""
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme="fp8-channel-token")
    convert(tmp_path, to)

    renamed_in(tmp_path, old, new)

    told = [fault for fault in faults(tmp_path) if "as the source has it" in fault.expected]
    assert [fault.found for fault in told] == [f"one with {new or 'no prefix'}"]
