"""`verify DIR OUT` understands engine-build checkpoints: it accepts exact ones and finds what is wrong in others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from builders import write_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config

from trtllm_ct.base.errors import CatalogError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.verify.verify import VerificationReport

SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocabulary": 97, "layers": 3}
TWO = Parallel(tensor=2)
LAYER = "transformer.layers.0."


def verified(
    tmp_path: Path,
    scheme: str,
    parallel: Parallel = TWO,
    *,
    architecture: str = "LlamaForCausalLM",
    damage: Callable[[dict[str, Tensor]], object] | None = None,
    kv: bool = False,
    sm: int | None = None,
    **more: object,
) -> VerificationReport:
    """The report about a conversion; `damage` changes the tensors of rank 1. `sm` asks for codes in its order."""
    built = write_checkpoint(
        tmp_path / "source", config=tiny_config(architecture, **SIZES | more), scheme=scheme, kv=kv
    )
    convert_checkpoint(
        built.directory, tmp_path / "out", to="engine", parallel=parallel, sm=sm, untested=sm is not None
    )
    if damage is not None:
        path = tmp_path / "out" / "rank1.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        damage(tensors)
        save_file(tensors, path)
    return verify_checkpoint(built.directory, tmp_path / "out")


@pytest.mark.parametrize(
    "scheme",
    ["dense", "int4-g64", "int4-g64-asym", "fp8-tensor-static", "fp8-channel-token", "w8a8", "w8a8-static",
     "int8-channel", "nvfp4"],
)  # fmt: skip
def test_every_algorithm_is_good(scheme: str, tmp_path: Path) -> None:
    report = verified(tmp_path, scheme, Parallel(tensor=4, pipeline=2), kv=scheme == "fp8-tensor-static")

    assert report.good, report.faults
    assert report.worst("plain") is not None
    assert (report.worst("native") is None) == (scheme == "dense")


@pytest.mark.parametrize(
    ("architecture", "scheme", "more"),
    [
        ("LlamaForCausalLM", "int4-g64", {"attention_bias": True, "mlp_bias": True}),
        ("LlamaForCausalLM", "int4-g64", {"tied": True}),
        ("Qwen2ForCausalLM", "int4-g64", {}),
        ("Qwen3ForCausalLM", "int4-g64", {}),
        ("MixtralForCausalLM", "int4-g64", {}),
    ],
)
def test_every_class_is_good(architecture: str, scheme: str, more: dict[str, object], tmp_path: Path) -> None:
    report = verified(tmp_path, scheme, architecture=architecture, **more)

    assert report.good, report.faults
    assert (report.worst("dequantized") is not None) == (architecture == "MixtralForCausalLM")


@pytest.mark.parametrize(
    ("scheme", "name", "change"),
    [
        ("int4-g64", f"{LAYER}attention.qkv.weight", lambda t: t.view(torch.uint8)[100, 5].bitwise_xor_(1)),
        ("int4-g64", f"{LAYER}mlp.proj.weights_scaling_factor", lambda t: t[3, 1].mul_(2)),
        ("int4-g64", f"{LAYER}mlp.proj.prequant_scaling_factor", lambda t: t[9].mul_(2)),
        ("int4-g64-asym", f"{LAYER}attention.dense.zero", lambda t: t[0, 7].add_(0.5)),
        ("fp8-tensor-static", f"{LAYER}attention.qkv.weights_scaling_factor", lambda t: t.mul_(1.01)),
        ("fp8-tensor-static", f"{LAYER}mlp.fc.activation_scaling_factor", lambda t: t.mul_(1.01)),
        ("fp8-tensor-static", f"{LAYER}attention.kv_cache_scaling_factor", lambda t: t.mul_(1.01)),
        ("fp8-channel-token", f"{LAYER}mlp.gate.per_channel_scale", lambda t: t[0].mul_(1.01)),
        ("w8a8", f"{LAYER}input_layernorm.scale_to_int", lambda t: t.mul_(2)),
        ("dense", f"{LAYER}post_layernorm.weight", lambda t: t[1].add_(1)),
        ("dense", "lm_head.weight", lambda t: t[-1, 0].fill_(1)),
        ("dense", "transformer.vocab_embedding.weight", lambda t: t[5, 5].add_(1)),
    ],
)
def test_a_changed_tensor_is_found(scheme: str, name: str, change: Callable[[Tensor], object], tmp_path: Path) -> None:
    report = verified(tmp_path, scheme, damage=lambda tensors: change(tensors[name]), kv=scheme == "fp8-tensor-static")

    assert not report.good
    found = name.rpartition(".")[0]
    assert all(fault.where.startswith(f"rank1.safetensors: {found}") for fault in report.faults)


@pytest.mark.parametrize("sm", [80, 89, 90])
@pytest.mark.parametrize("scheme", ["int4-g64", "int4-g64-asym", "int4-channel", "int8-g64", "int8-channel-asym"])
def test_codes_in_the_order_of_a_kernel_are_good(scheme: str, sm: int, tmp_path: Path) -> None:
    report = verified(tmp_path, scheme, Parallel(tensor=4, pipeline=2), sm=sm, attention_bias=True, mlp_bias=True)

    assert report.good, report.faults
    assert report.worst("native") is not None


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{LAYER}attention.qkv.weight", lambda t: t.view(torch.uint8)[100, 5].bitwise_xor_(1)),
        (f"{LAYER}mlp.proj.weights_scaling_factor", lambda t: t[1, 3].mul_(2)),
        (f"{LAYER}mlp.fc.zero", lambda t: t[0, 7].add_(0.5)),
        (f"{LAYER}attention.dense.bias", lambda t: t[7].add_(0.5)),
    ],
)
def test_a_changed_tensor_in_the_order_of_a_kernel_is_found(
    sm: int, name: str, change: Callable[[Tensor], object], tmp_path: Path
) -> None:
    report = verified(tmp_path, "int4-g64", damage=lambda tensors: change(tensors[name]), sm=sm, attention_bias=True)

    assert {fault.where.partition(",")[0].rpartition(".")[0] for fault in report.faults} == {
        f"rank1.safetensors: {name.rpartition('.')[0]}"
    }


def test_the_order_of_another_generation_is_found(tmp_path: Path) -> None:
    """The files of SM80 and SM90 have the same names, dtypes and shapes: config.json says which one they are for."""
    verified(tmp_path, "int4-g64", sm=90)
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"sm": 90', '"sm": 80'))

    report = verify_checkpoint(tmp_path / "source", tmp_path / "out")

    linears = [fault for fault in report.faults if ".attention." in fault.where or ".mlp." in fault.where]
    assert len(linears) == len(report.faults) == 3 * 5 * 2 + 3 * 2 * 2


def test_an_order_of_no_known_generation_is_an_error(tmp_path: Path) -> None:
    verified(tmp_path, "int4-g64", sm=90)
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"sm": 90', '"from": 90'))

    with pytest.raises(CatalogError, match=r"producer\.sm: the GPUs that the files of W4A16_GPTQ are for"):
        verify_checkpoint(tmp_path / "source", tmp_path / "out")


def test_fc_and_gate_in_each_others_place_are_found(tmp_path: Path) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        fc, gate = f"{LAYER}mlp.fc.weight", f"{LAYER}mlp.gate.weight"
        tensors[fc], tensors[gate] = tensors[gate], tensors[fc]

    report = verified(tmp_path, "dense", damage=swap)

    assert {fault.where.partition(",")[0] for fault in report.faults} == {
        f"rank1.safetensors: {LAYER}mlp.{name}.weight" for name in ("fc", "gate")
    }


def test_missing_and_surplus_tensors_are_found(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}mlp.other"] = tensors.pop(f"{LAYER}attention.dense.weight")

    report = verified(tmp_path, "dense", damage=rename)

    assert [fault.where for fault in report.faults] == [
        f"rank1.safetensors: {LAYER}attention.dense.weight",
        f"rank1.safetensors: {LAYER}mlp.other",
    ]


def test_a_missing_file_of_a_rank_is_an_error(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=tiny_config(**SIZES), scheme="dense")
    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=TWO)
    (tmp_path / "out" / "rank1.safetensors").unlink()

    with pytest.raises(Exception, match=r"rank1\.safetensors: one file for each of 2 ranks"):
        verify_checkpoint(built.directory, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_base", 5e5),
        ("rotary_scaling", {"type": "linear", "factor": 2.0}),
        ("norm_epsilon", 1e-3),
        ("position_embedding_type", "learned_absolute"),
        ("hidden_act", "gelu"),
        ("disable_weight_only_quant_plugin", False),
        ("architecture", "Qwen2ForCausalLM"),
        ("vocab_size", 97),
        ("num_attention_heads", 2),
        ("quantization.use_made_up_key", True),
    ],
)
def test_a_changed_statement_is_found(key: str, value: object, tmp_path: Path) -> None:
    built, out = _converted(tmp_path)
    document = json.loads((out / "config.json").read_text())
    block, _, inner = key.rpartition(".")
    (document[block] if block else document)[inner] = value
    (out / "config.json").write_text(json.dumps(document))

    faults = verify_checkpoint(built, out).faults

    assert any(key.rpartition(".")[2] in fault.where for fault in faults)


@pytest.mark.parametrize("name", ["rank2.safetensors", "quant_cfg.json"])
def test_a_file_of_another_conversion_is_found(name: str, tmp_path: Path) -> None:
    built, out = _converted(tmp_path)
    assert verify_checkpoint(built, out).good
    (out / name).write_bytes((out / "rank1.safetensors").read_bytes())

    (fault,) = verify_checkpoint(built, out).faults

    assert fault.where == str(out / name)


def _converted(tmp_path: Path) -> tuple[Path, Path]:
    built = write_checkpoint(tmp_path / "in", scheme="int8-channel", config=tiny_config(hidden=128, intermediate=256))
    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=Parallel(tensor=2))
    return built.directory, tmp_path / "out"
