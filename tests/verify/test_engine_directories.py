"""`verify DIR OUT` understands engine-build checkpoints: it accepts exact ones and finds what is wrong in others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import rewrite_config, write_checkpoint
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


def _only(kept: str) -> Callable[[dict[str, Tensor]], object]:
    """Leave one name of the table that is embedding and head, or both."""

    def edit(stored: dict[str, Tensor]) -> None:
        if kept == "embed_tokens":
            for name in [name for name in stored if name.startswith("lm_head.")]:
                del stored[name]
        elif kept == "lm_head":
            del stored["model.embed_tokens.weight"]
        else:
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()

    return edit


@pytest.mark.parametrize("scheme", ["dense", "int8-channel"])
@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head", "both"])
def test_a_tied_table_is_good_and_compared_under_each_name_that_it_is_stored_by(
    kept: str, scheme: str, tmp_path: Path
) -> None:
    quantized = {"lm_head": scheme} if kept == "lm_head" else scheme
    config = tiny_config(**SIZES)
    write_checkpoint(tmp_path / "source", config=config, scheme=quantized, edit=_only(kept))
    rewrite_config(tmp_path / "source", lambda config: config.update(tie_word_embeddings=True))
    convert_checkpoint(tmp_path / "source", tmp_path / "out", to="engine", parallel=Parallel(tensor=2, pipeline=2))

    assert verify_checkpoint(tmp_path / "source", tmp_path / "out").good

    for rank, name in ((0, "transformer.vocab_embedding"), (3, "lm_head")):
        path = tmp_path / "out" / f"rank{rank}.safetensors"
        before, tensors = path.read_bytes(), load_file(path)
        tensors[f"{name}.weight"][5, 5] += 1
        save_file(tensors, path)
        report = verify_checkpoint(tmp_path / "source", tmp_path / "out")
        (fault,) = report.faults
        assert fault.where.startswith(f"rank{rank}.safetensors: {name}.weight")
        path.write_bytes(before)


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

    with pytest.raises(CatalogError, match=r"producer\.sm: expected 80, 89 or 90, the GPUs that it is for"):
        verify_checkpoint(tmp_path / "source", tmp_path / "out")


def longer(tensor: Tensor, axis: int = 0, value: float = 0) -> Tensor:
    """The tensor with one more entry along an axis."""
    more = torch.full_like(tensor.narrow(axis, 0, 1).float(), value).to(tensor.dtype)
    return torch.cat([tensor, more], dim=axis)


@pytest.mark.parametrize(
    ("scheme", "name", "change", "more"),
    [
        ("dense", "lm_head.weight", longer, {}),
        ("dense", "lm_head.weight", lambda t: t[:-1], {}),
        ("dense", "transformer.vocab_embedding.weight", longer, {}),
        ("dense", "transformer.ln_f.weight", longer, {}),
        ("dense", f"{LAYER}input_layernorm.weight", longer, {}),
        ("dense", f"{LAYER}attention.qkv.weight", longer, {}),
        ("dense", f"{LAYER}attention.dense.weight", lambda t: longer(t, 1), {}),
        ("dense", f"{LAYER}attention.qkv.bias", longer, {"attention_bias": True}),
        ("dense", f"{LAYER}mlp.proj.bias", longer, {"mlp_bias": True}),
        ("dense", f"{LAYER}mlp.fc.weight", lambda t: t.float(), {}),
        ("dense", f"{LAYER}mlp.fc.weight", longer, {"architecture": "MixtralForCausalLM"}),
        ("dense", f"{LAYER}mlp.router.weight", lambda t: t.bfloat16(), {"architecture": "MixtralForCausalLM"}),
        ("dense", f"{LAYER}attention.q_layernorm.weight", longer, {"architecture": "Qwen3ForCausalLM"}),
        ("int4-g64", f"{LAYER}attention.qkv.weight", longer, {}),
        ("int4-g64", f"{LAYER}attention.qkv.weights_scaling_factor", lambda t: longer(t, 0, 1), {}),
        ("int4-g64", f"{LAYER}mlp.proj.weights_scaling_factor", lambda t: longer(t, 1, 1), {}),
        ("int4-g64", f"{LAYER}mlp.proj.prequant_scaling_factor", lambda t: longer(t, 0, 1), {}),
        ("int4-g64-asym", f"{LAYER}attention.dense.zero", longer, {}),
        ("int4-g64-asym", f"{LAYER}attention.dense.zero", lambda t: longer(t, 1), {}),
        ("int8-channel", f"{LAYER}mlp.gate.per_channel_scale", lambda t: longer(t, 0, 1), {}),
        ("fp8-channel-token", f"{LAYER}mlp.gate.weight", longer, {}),
        ("fp8-channel-token", f"{LAYER}mlp.gate.per_channel_scale", lambda t: t.bfloat16(), {}),
        ("fp8-tensor-static", f"{LAYER}mlp.fc.activation_scaling_factor", lambda t: t.repeat(2), {}),
        ("fp8-tensor-static", f"{LAYER}attention.kv_cache_scaling_factor", lambda t: t.repeat(2), {}),
        ("w8a8", f"{LAYER}mlp.proj.smoother", lambda t: longer(t, 1, 1), {}),
        ("w8a8", f"{LAYER}mlp.fc.per_channel_scale", lambda t: t.flatten(), {}),
        ("w8a8", f"{LAYER}input_layernorm.scale_to_int", lambda t: t.repeat(2), {}),
        ("w8a8-static", f"{LAYER}mlp.fc.prequant_scaling_factor", lambda t: longer(t, 0, 1), {}),
        ("nvfp4", f"{LAYER}mlp.fc.weights_scaling_factor", longer, {}),
        ("nvfp4", f"{LAYER}mlp.fc.weights_scaling_factor_2", lambda t: t.repeat(2), {}),
    ],
)  # fmt: skip
def test_a_tensor_of_another_size_or_dtype_is_found_once(
    scheme: str, name: str, change: Callable[[Tensor], Tensor], more: dict[str, object], tmp_path: Path
) -> None:
    """Also where all that is compared with the source is right: rows that come from nowhere are no part of it."""
    report = verified(
        tmp_path,
        scheme,
        damage=lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}),
        kv=scheme == "fp8-tensor-static",
        **more,
    )

    assert [fault.where for fault in report.faults] == [f"rank1.safetensors: {name}"]


@pytest.mark.parametrize("axis", ["weight", "weights_scaling_factor", "zero"])
@pytest.mark.parametrize("row", ["keys", "values"])
def test_a_repeated_head_that_differs_on_one_rank_is_found(row: str, axis: str, tmp_path: Path) -> None:
    """Four ranks share two K/V heads of 64 rows; ranks 0 and 1 have the same one, behind a head of queries."""
    first = 64 if row == "keys" else 128

    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors[f"{LAYER}attention.qkv.{axis}"]
        if axis == "weight":  # two rows in a byte
            tensor.view(torch.uint8)[first // 2 + 3, 5].bitwise_xor_(1)
        elif axis == "zero":
            tensor[0, first + 3] += 0.5
        else:
            tensor[first + 3, 0] *= 2

    report = verified(tmp_path, "int4-g64-asym", Parallel(tensor=4), damage=change)

    assert [fault.where.partition(",")[0] for fault in report.faults] == [
        f"rank1.safetensors: {LAYER}attention.qkv.weight"
    ]


@pytest.mark.parametrize("row", [0, 24])
def test_changed_padding_of_the_head_is_found(row: int, tmp_path: Path) -> None:
    """97 words on four ranks of 25 rows: the last rank has 22 rows and 3 of padding."""
    built = write_checkpoint(tmp_path / "in", scheme="dense", config=tiny_config(**SIZES))
    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=Parallel(tensor=4))
    path = tmp_path / "out" / "rank3.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    assert tensors["lm_head.weight"].shape[0] == 25
    tensors["lm_head.weight"][row, 9] += 2.0
    save_file(tensors, path)

    (fault,) = verify_checkpoint(built.directory, tmp_path / "out").faults

    assert fault.where.startswith("rank3.safetensors: lm_head.weight")


def test_an_expert_too_many_is_found(tmp_path: Path) -> None:
    report = verified(
        tmp_path,
        "dense",
        architecture="MixtralForCausalLM",
        damage=lambda tensors: tensors.update({f"{LAYER}mlp.proj.weight": longer(tensors[f"{LAYER}mlp.proj.weight"])}),
    )

    assert [fault.where for fault in report.faults] == [f"rank1.safetensors: {LAYER}mlp.proj.weight"]


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
