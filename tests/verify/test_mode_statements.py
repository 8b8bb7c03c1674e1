"""The modes that a converted directory states: wrong as engines read them is a fault, though every weight is right."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from builders import tiny_config, write_checkpoint
from multimodal import write_multimodal

from trtllm_ct.base.errors import ConfigError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.plan.engine_names import EngineNames
from trtllm_ct.plan.models.class_rows import CLASS_ROWS
from trtllm_ct.verify.compared_names import ComparedNames
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIG = tiny_config(hidden=256, intermediate=256)
FP8 = "fp8-channel-token"
INT4 = "int4-g64"
MIXED = {"o_proj": INT4, "down_proj": FP8}
WRAPPER, BODY = "Mistral3ForConditionalGeneration", "language_model.model."
EXPERTS = tiny_config(
    "Qwen3MoeForCausalLM",
    hidden=256,
    intermediate=256,
    model_type="qwen3_moe",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
)
ATTENTION_ONLY = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), FP8)


def faults(root: Path) -> list[str]:
    report = verify_checkpoint(root / "in", root / "out")
    return [fault.where.removeprefix(f"{root / 'out'}/") for fault in report.faults]


def convert(root: Path, **more: Any) -> None:
    convert_checkpoint(root / "in", root / "out", **more)
    assert faults(root) == []


def edit_modes(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the quantization in both files that state it."""
    for name in ("hf_quant_config.json", "quant_cfg.json"):
        path = root / "out" / name
        if path.is_file():
            document = json.loads(path.read_text())
            quantization = document.get("quantization", document)
            if quantization is not document or "quantized_layers" in document:
                edit(quantization)
            path.write_text(json.dumps(document))


def without(key: str, pattern: str) -> Callable[[dict[str, Any]], object]:
    """Return an edit that removes the names that a pattern matches, of which there must be some."""

    def edit(quantization: dict[str, Any]) -> None:
        names = quantization.get(key, {})
        kept = [name for name in names if not re.search(pattern, name)]
        assert not names or len(kept) < len(names)
        if isinstance(names, dict):
            names = {name: names[name] for name in kept}
        if key in quantization:
            quantization[key] = names if isinstance(names, dict) else kept

    return edit


@pytest.mark.parametrize("scheme", [FP8, "mixed"])
@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        ("exclude_modules", r"^model\.embed_tokens"),
        ("exclude_modules", "^lm_head$"),
        ("exclude_modules", r"^language_model\.lm_head$"),
        ("exclude_modules", "vision"),
        ("exclude_modules", "projector"),
        ("quantized_layers", r"^model\.layers\.0\.self_attn\.o_proj"),
        ("quantized_layers", r"^language_model\.model\.layers\.1"),
    ],
)
def test_a_name_that_an_engine_compares_must_not_be_missing(
    tmp_path: Path, scheme: str, key: str, pattern: str
) -> None:
    more = {} if scheme == "mixed" else {"scheme": scheme}
    write_multimodal(tmp_path / "in", BODY, architecture=WRAPPER, **more)
    convert(tmp_path)
    has_layers = "quantized_layers" in json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    if key == "quantized_layers" and not has_layers:
        return

    edit_modes(tmp_path, without(key, pattern))

    assert any(key in where or "weight" in where for where in faults(tmp_path))


@pytest.mark.parametrize("engine", ["stock-1.0", "stock-1.2", "stock-1.3"])
@pytest.mark.parametrize("leaf", ["", ".backend"])
def test_plain_experts_are_excluded_as_the_release_builds_them(tmp_path: Path, engine: str, leaf: str) -> None:
    write_checkpoint(tmp_path / "in", config=EXPERTS, scheme=ATTENTION_ONLY)
    convert(tmp_path, engine=engine)
    excluded = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert any(name.endswith(".backend") for name in excluded) is (engine == "stock-1.2")
    if leaf and engine != "stock-1.2":
        name = "model.layers.0.mlp.experts.backend"
        edit_modes(tmp_path, lambda quantization: quantization["exclude_modules"].append(name))
    else:
        edit_modes(tmp_path, without("exclude_modules", rf"layers\.0\.mlp\.experts{re.escape(leaf)}$"))

    found = faults(tmp_path)
    assert found == ["hf_quant_config.json: quantization.exclude_modules"] if leaf else found


@pytest.mark.parametrize(
    "name",
    [
        "*",
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.9.mlp.up_proj",
        "o_proj",
    ],
)
def test_an_exclusion_of_no_plain_module_is_found(tmp_path: Path, name: str) -> None:
    """Engines match patterns and the names of fused Linears, which no file has."""
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme=FP8)
    convert(tmp_path)

    edit_modes(tmp_path, lambda quantization: quantization["exclude_modules"].append(name))

    assert faults(tmp_path)


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (lambda quantization: quantization.update(quant_algo="FP8"), "quant_algo"),
        (lambda quantization: quantization.update(quant_algo=None), "quant_algo"),
        (lambda quantization: quantization.update(has_zero_point=True), ""),
        (lambda quantization: quantization.update(smoothquant_val=0.5), "smoothquant_val"),
        (
            lambda quantization: quantization["quantized_layers"].update(
                {"model.layers.7.o_proj": {"quant_algo": "FP8"}}
            ),
            "quantized_layers",
        ),
    ],
    ids=["one mode", "no mode", "global flag", "unknown key", "unknown module"],
)
def test_modes_of_layers_must_be_read_as_they_are_meant(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], key: str
) -> None:
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme=MIXED)
    convert(tmp_path)

    edit_modes(tmp_path, edit)

    assert any(where.startswith(f"hf_quant_config.json: quantization.{key}") for where in faults(tmp_path)) is bool(key)


def test_releases_before_1_2_need_their_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme=MIXED)
    convert(tmp_path)

    (tmp_path / "out" / "quant_cfg.json").unlink()

    assert faults(tmp_path) == ["quant_cfg.json"]


@pytest.mark.parametrize(
    "scheme", [INT4, "nvfp4", FP8, "fp8-tensor-static", "fp8-block", "int8-channel", "mxfp4", "mxfp8"]
)
@pytest.mark.parametrize(
    "change", [{"has_zero_point": True}, {"pre_quant_scale": "other"}, {"group_size": 7}, {"group_size": True}]
)
def test_flags_are_those_of_the_algorithm(tmp_path: Path, scheme: str, change: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "in", config=CONFIG, scheme=scheme)
    convert(tmp_path, engine="stock-1.3", sm=100 if scheme.startswith("mx") else None)

    def edit(quantization: dict[str, Any]) -> None:
        flag = {"pre_quant_scale": not quantization.get("pre_quant_scale", False)}
        quantization |= flag if "pre_quant_scale" in change else change

    path = tmp_path / "out" / "hf_quant_config.json"
    document = json.loads(path.read_text())
    edit(document["quantization"])
    path.write_text(json.dumps(document))

    if change == {"group_size": True}:
        with pytest.raises(ConfigError, match="group_size: bool in place of int"):
            faults(tmp_path)
    else:
        assert any(next(iter(change)) in where or "weight" in where for where in faults(tmp_path))


NAMES = (
    "model.embed_tokens", "lm_head", "embed", "head", "mtp.layers.0.self_attn.o_proj", "mtp.1.attn.wq_a",
    *(
        f"{body}layers.3.{path}"
        for body in ("model.", "model.language_model.", "language_model.model.", "backbone.", "")
        for path in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.qkv_proj",
            "self_attn.indexer.wk", "mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.c_fc",
            "mlp.c_proj", "mlp.router", "mlp.router.gate", "mlp.gate", "mlp.gate.wg", "router.proj", "moe.gate",
            "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_a", "linear_attn.in_proj_b",
            "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba", "linear_attn.out_proj", "mixer.in_proj",
            "attn.wq_a", "attn.wkv", "attn.wq_b", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b",
            "attn.indexer.weights_proj", "attn.indexer.compressor.wkv", "attn.compressor.wgate", "ffn.gate",
            "ffn.shared_experts.w1", "ffn.shared_experts.w2", "ffn.shared_experts.w3",
        )
    ),
)  # fmt: skip
EXPERT_PATHS = ("0.gate_proj", "1.w2", "gate_up_proj")


@pytest.mark.parametrize("engine", ["stock-1.0", "stock-1.2", "stock-1.3"])
@pytest.mark.parametrize("architecture", sorted(CLASS_ROWS))
def test_planner_and_verification_agree_on_the_names_that_a_class_compares(architecture: str, engine: str) -> None:
    """The two are written apart; a class that is added to one must be added to the other."""
    row, layers = CLASS_ROWS[architecture], 5
    names = EngineNames(
        experts=row.experts, wrapped=engine == "stock-1.2", fused=bool(row.splits), inner=row.inner,
        drafts=row.drafts, layers=layers,
    )  # fmt: skip
    compared = ComparedNames.of({"architectures": [architecture], "num_hidden_layers": layers}, engine, None)
    experts = [f"{around}.{row.experts}.{path}" for around in ("model.layers.3", "mtp.0") for path in EXPERT_PATHS]

    for name in (*NAMES, *(() if row.splits else experts)):
        assert set(compared.of_module(name)) == set(names.of_module(name)), name
