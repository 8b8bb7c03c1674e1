"""Malformed checkpoints end to end: each refused by name, with words that help, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import fp8_weights, rewrite, rewrite_config, tiny_config, write_checkpoint
from command_line import run_cli
from safetensors.torch import save_file
from torch import Tensor

from trtllm_ct.convert import convert_checkpoint
from trtllm_ct.errors import CatalogError, CheckpointError, ConfigError, DetectionError, PayloadError, PlanError

WEIGHTS = "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ATTENTION = "model.layers.0.self_attn"
Q, DOWN = f"{ATTENTION}.q_proj", "model.layers.1.mlp.down_proj"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

Damage = Callable[[Path], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A checkpoint of `options`, damaged, and what its one or first fault says: parts of the four fields."""

    damage: Damage
    error: type[CheckpointError]
    where: str
    expected: str
    found: str
    remedy: str
    options: dict[str, Any] = field(default_factory=dict)


def file(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Damage:
    """Change the bytes of a file."""
    return lambda directory: (directory / name).write_bytes(change((directory / name).read_bytes()))


def header(change: Callable[[dict[str, Any]], object], name: str = WEIGHTS) -> Damage:
    """Change the header of a safetensors file, parsed; the payload stays."""

    def rewritten(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return file(rewritten, name)


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    """Change the weight map of the index."""

    def rewritten(content: bytes) -> bytes:
        document = json.loads(content)
        change(document["weight_map"])
        return json.dumps(document).encode()

    return file(rewritten, INDEX)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    return lambda directory: rewrite(directory, change)


def config(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda directory: rewrite_config(directory, change)


def block(**entries: object) -> Damage:
    """Change the quantization block."""
    return config(lambda document: document["quantization_config"].update(entries))


def weights_of_group(**arguments: object) -> Damage:
    return config(
        lambda document: document["quantization_config"]["config_groups"]["group_0"]["weights"].update(arguments)
    )


def element(name: str, value: float) -> Damage:
    """Overwrite the last element of a tensor."""

    def write(stored: dict[str, Tensor]) -> None:
        stored[name].view(-1)[-1] = value

    return tensors(write)


def in_order(*steps: Damage) -> Damage:
    return lambda directory: [step(directory) for step in steps]


def move(entries: dict[str, Any], by: int) -> None:
    """Shift the payload of the last tensor."""
    last = max((name for name in entries if name != "__metadata__"), key=lambda name: entries[name]["data_offsets"])
    entries[last]["data_offsets"] = [offset + by for offset in entries[last]["data_offsets"]]


def name_twice(content: bytes) -> bytes:
    """A header whose first key stands there again."""
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(text)["model.norm.weight"]).encode()
    text = text[:-1] + b', "model.norm.weight": ' + entry + b"}"
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def pickle_only(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02")


def second_file(directory: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, directory / "extra.safetensors")


def five_exponent_bits(stored: dict[str, Tensor]) -> None:
    """float8 of the kind that is meant for gradients: no release writes weights in it."""
    stored[f"{Q}.weight"] = stored[f"{Q}.weight"].float().to(torch.float8_e5m2)


SHARDED = {"shards": 2}
INT4_ASYMMETRIC = {"scheme": "int4-g32-asym"}
FP8 = {"scheme": "fp8-tensor-static"}
FP8_KV = FP8 | {"kv": True}
DAMAGED_FILE = "incomplete or damaged: download it again"
SAVE_AGAIN = "save the checkpoint again with the safetensors library"
NOT_CALIBRATED = "damaged or badly calibrated"

CASES: dict[str, Case] = {
    "truncated file": Case(
        damage=file(lambda content: content[:-10]),
        error=CatalogError,
        where=WEIGHTS,
        expected="bytes of payload",
        found="a truncated file",
        remedy=DAMAGED_FILE,
    ),
    "truncated header": Case(
        damage=file(lambda content: content[:100]),
        error=CatalogError,
        where=WEIGHTS,
        expected="a header of",
        found="100 bytes in the whole file",
        remedy=DAMAGED_FILE,
    ),
    "LFS pointer": Case(
        damage=file(lambda content: POINTER),
        error=CatalogError,
        where=WEIGHTS,
        expected="the content of the file",
        found="a Git LFS pointer to it",
        remedy="this is an LFS pointer, run git lfs pull",
    ),
    "LFS pointer instead of config.json": Case(
        damage=file(lambda content: POINTER, "config.json"),
        error=ConfigError,
        where="config.json",
        expected="readable JSON",
        found="Expecting value",
        remedy="run git lfs pull",
    ),
    "oversized header": Case(
        damage=file(lambda content: (2**40).to_bytes(8, "little") + content[8:]),
        error=CatalogError,
        where=WEIGHTS,
        expected="a safetensors header of at most 100000000 bytes",
        found=f"a header length of {2**40} bytes",
        remedy="This is no safetensors file",
    ),
    "overlapping offsets": Case(
        damage=header(lambda entries: move(entries, -8)),
        error=CatalogError,
        where=f"{WEIGHTS}: ",
        expected="its data to begin at",
        found="inside",
        remedy=SAVE_AGAIN,
    ),
    "out-of-range offsets": Case(
        damage=in_order(header(lambda entries: move(entries, 4096)), file(lambda content: content + bytes(100))),
        error=CatalogError,
        where=f"{WEIGHTS}: ",
        expected="its data to begin at",
        found="a hole of 4096 bytes",
        remedy=SAVE_AGAIN,
    ),
    "size that is not shape times dtype": Case(
        damage=header(lambda entries: entries["model.norm.weight"].update(shape=[65])),
        error=CatalogError,
        where=f"{WEIGHTS}: model.norm.weight",
        expected="130 bytes for bfloat16 [65]",
        found="128 bytes in data_offsets",
        remedy=SAVE_AGAIN,
    ),
    "dtype that nobody knows": Case(
        damage=header(lambda entries: entries["model.norm.weight"].update(dtype="C64")),
        error=CatalogError,
        where=f"{WEIGHTS}: model.norm.weight",
        expected="one of the dtypes BOOL, U8",
        found='"C64"',
        remedy="Save the tensor in one of the expected dtypes",
    ),
    "name twice in one file": Case(
        damage=file(name_twice),
        error=CatalogError,
        where=WEIGHTS,
        expected="each name once",
        found="more than once: model.norm.weight",
        remedy=SAVE_AGAIN,
    ),
    "name in two files": Case(
        damage=second_file,
        error=CatalogError,
        where=f"extra.safetensors and {WEIGHTS}",
        expected="each tensor in one file",
        found="1 in both: model.norm.weight",
        remedy="keep those of one of them",
    ),
    "missing shard": Case(
        options=SHARDED,
        damage=lambda directory: (directory / SECOND).unlink(),
        error=CatalogError,
        where=SECOND,
        expected=f"the file, which {INDEX} names for",
        found="no such file",
        remedy="The download is incomplete",
    ),
    "missing shard, no index": Case(
        options=SHARDED,
        damage=lambda directory: [(directory / name).unlink() for name in (INDEX, FIRST)],
        error=CatalogError,
        where="model-*-of-00002.safetensors",
        expected="2 shards",
        found="no number 1",
        remedy="The download is incomplete",
    ),
    "shard outside the directory": Case(
        options=SHARDED,
        damage=index(lambda weight_map: weight_map.update({"lm_head.weight": "../model.safetensors"})),
        error=CatalogError,
        where=INDEX,
        expected="paths inside the checkpoint directory",
        found="'../model.safetensors'",
        remedy="Do not load this checkpoint",
    ),
    "index entry that no file has": Case(
        options=SHARDED,
        damage=index(lambda weight_map: weight_map.update({"model.lost.weight": FIRST})),
        error=CatalogError,
        where=FIRST,
        expected=f"the tensors that {INDEX} lists",
        found="1 of them in no file: model.lost.weight",
        remedy="download all of them again from one revision",
    ),
    "pickle only": Case(
        damage=pickle_only,
        error=CatalogError,
        where="source",
        expected="safetensors files",
        found="pickle files only: pytorch_model.bin",
        remedy="Pickle runs code of the file's author",
    ),
    "no weights": Case(
        damage=lambda directory: (directory / WEIGHTS).unlink(),
        error=CatalogError,
        where="source",
        expected="safetensors files",
        found="no weights among config.json",
        remedy="the download is incomplete",
    ),
    "no config.json": Case(
        damage=lambda directory: (directory / "config.json").unlink(),
        error=DetectionError,
        where="source",
        expected="a directory with config.json or params.json",
        found="neither of them",
        remedy="Give the directory of a whole checkpoint",
    ),
    "another quantization method": Case(
        damage=config(lambda document: document.update(quantization_config={"quant_method": "gptq", "bits": 4})),
        error=DetectionError,
        where="source",
        expected="a compressed-tensors checkpoint",
        found="an AutoGPTQ checkpoint, not compressed-tensors",
        remedy="GPTQ",
    ),
    "argument without a meaning": Case(
        damage=weights_of_group(strategy="rainbow"),
        error=ConfigError,
        where="config_groups.group_0.weights.strategy",
        expected="group",
        found='"rainbow"',
        remedy="quantize again with a current llm-compressor",
    ),
    "unknown architecture": Case(
        damage=config(lambda document: document.update(architectures=["GrokForCausalLM"])),
        error=ConfigError,
        where="config.json: architectures",
        expected="LlamaForCausalLM",
        found="GrokForCausalLM",
        remedy="nothing is guessed",
    ),
    "leftover weight_scale without weight": Case(
        damage=tensors(lambda stored: stored.update({"model.layers.9.mlp.up_proj.weight_scale": torch.ones(1)})),
        error=PlanError,
        where="model.layers.9.mlp.up_proj.weight_scale",
        expected="a module that this tensor belongs to",
        found="float32 [1] without an owner",
        remedy="a tensor was lost or renamed",
    ),
    "weight_packed without weight_scale": Case(
        damage=tensors(lambda stored: stored.pop(f"{Q}.weight_scale")),
        error=PlanError,
        where=f"{Q}.weight_scale",
        expected="a scale of shape [64, 2] for strategy group and group_size 32 over 64 inputs",
        found="no such tensor",
        remedy="Without its scale the weight has no value",
    ),
    "asymmetric without zero point": Case(
        options=INT4_ASYMMETRIC,
        damage=in_order(tensors(lambda stored: stored.pop(f"{Q}.weight_zero_point")), block(version="0.13.0")),
        error=PlanError,
        where=f"{Q}.weight_zero_point",
        expected="the zero points of an asymmetric weight",
        found="no such tensor",
        remedy="Without them the weight is wrong",
    ),
    "weight and weight_packed": Case(
        damage=tensors(lambda stored: stored.update({f"{Q}.weight": torch.ones(64, 64)})),
        error=PlanError,
        where=Q,
        expected="either weight or weight_packed",
        found="both",
        remedy="find out which one is meant",
    ),
    "scale of another group size": Case(
        damage=weights_of_group(group_size=64),
        error=PlanError,
        where=f"{Q}.weight_scale",
        expected="shape [64, 1] for strategy group and group_size 64 over 64 inputs",
        found="bfloat16 [64, 2]",
        remedy="The checkpoint may be of group_size 32",
    ),
    "scale of another dtype": Case(
        damage=tensors(lambda stored: stored.update({f"{Q}.weight_scale": torch.ones(64, 2, dtype=torch.int32)})),
        error=PlanError,
        where=f"{Q}.weight_scale",
        expected="float32",
        found="int32 [64, 2]",
        remedy="another format",
    ),
    "weight_shape that contradicts": Case(
        damage=tensors(lambda stored: stored.update({f"{Q}.weight_shape": torch.tensor([64, 63])})),
        error=PayloadError,
        where=f"{Q}.weight_shape",
        expected="[64, 64], which the packed codes and config.json make",
        found="[64, 63]",
        remedy="Codes and shape belong to different weights",
    ),
    "NaN scale": Case(
        damage=element(f"{DOWN}.weight_scale", float("nan")),
        error=PayloadError,
        where=f"{DOWN}.weight_scale[63, 3]",
        expected="a finite scale that is not negative",
        found="nan (1 of 256 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "infinite scale": Case(
        damage=element(f"{Q}.weight_scale", float("inf")),
        error=PayloadError,
        where=f"{Q}.weight_scale[63, 1]",
        expected="a finite scale that is not negative",
        found="inf (1 of 128 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "negative scale": Case(
        damage=element(f"{Q}.weight_scale", -0.5),
        error=PayloadError,
        where=f"{Q}.weight_scale[63, 1]",
        expected="a finite scale that is not negative",
        found="-0.5 (1 of 128 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "zero scale of a whole tensor": Case(
        options=FP8,
        damage=element(f"{Q}.weight_scale", 0),
        error=PayloadError,
        where=f"{Q}.weight_scale",
        expected="a finite scale that is positive",
        found="0 (1 of 1 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "zero input_scale": Case(
        options=FP8,
        damage=element(f"{Q}.input_scale", 0),
        error=PayloadError,
        where=f"{Q}.input_scale",
        expected="a finite scale that is positive",
        found="0 (1 of 1 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "zero KV scale": Case(
        options=FP8_KV,
        damage=element(f"{ATTENTION}.v_scale", 0),
        error=PayloadError,
        where=f"{ATTENTION}.v_scale",
        expected="a finite scale that is positive",
        found="0 (1 of 1 elements are bad)",
        remedy=NOT_CALIBRATED,
    ),
    "unsigned zero points": Case(
        options=INT4_ASYMMETRIC,
        damage=tensors(
            lambda stored: stored.update({f"{Q}.weight_zero_point": torch.full((64, 2), 8, dtype=torch.int8)})
        ),
        error=PayloadError,
        where=f"{Q}.weight_zero_point",
        expected="signed zero points in [-8, 7]",
        found="values from 8 to 8",
        remedy="quantize again with a current release",
    ),
    "static fp8 without input_scale": Case(
        options=FP8,
        damage=tensors(lambda stored: stored.pop(f"{Q}.input_scale")),
        error=PlanError,
        where=f"{Q}.input_scale",
        expected="the static scale of the module's input",
        found="no such tensor",
        remedy="quantize again with dynamic activations",
    ),
    "kv_cache_scheme without scales": Case(
        options=FP8,
        damage=block(kv_cache_scheme=fp8_weights("tensor")),
        error=PlanError,
        where=f"{ATTENTION}.k_scale",
        expected="the scale that kv_cache_scheme promises",
        found="no such tensor",
        remedy="remove kv_cache_scheme",
    ),
    "wrong model sizes": Case(
        damage=config(lambda document: document.update(intermediate_size=256)),
        error=PlanError,
        where="model.layers.0.mlp.gate_proj",
        expected="a weight of [256, 64] (out, in) by the sizes in config.json",
        found="codes for [128, 64]",
        remedy="config.json and the weights belong to different models",
    ),
    "a lost layer": Case(
        damage=config(lambda document: document.update(num_hidden_layers=3)),
        error=PlanError,
        where="model.layers.2.input_layernorm.weight",
        expected="a tensor that LlamaForCausalLM needs",
        found="no such tensor in any shard",
        remedy="Download the checkpoint again",
    ),
    "unsupported format": Case(
        options=FP8,
        damage=tensors(five_exponent_bits),
        error=PlanError,
        where=Q,
        expected="tensors of one of the formats",
        found="fp8 tensor, input fp8 tensor, declared float-quantized (input_scale bfloat16, weight float8_e5m2",
        remedy="against the tool that wrote the file",
    ),
    "online transform": Case(
        damage=block(
            transform_config={
                "config_groups": {
                    "R3": {"type": "hadamard", "apply": [{"targets": ["LlamaAttention"], "location": "k_cache"}]},
                }
            }
        ),
        error=PlanError,
        where="transform_config.R3",
        expected="transforms that",
        found="a hadamard transform applied at run time (k_cache)",
        remedy="Without the rotation the model is wrong",
    ),
    "experts that were shrunk": Case(
        damage=block(moe_sparsity_config={"method": "novice", "num_experts": [4, 4]}),
        error=PlanError,
        where="moe_sparsity_config",
        expected="method prune",
        found="method novice",
        remedy="use the unpruned checkpoint",
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def source(case: Case, tmp_path: Path) -> Path:
    options = {"config": tiny_config(), "scheme": "int4-g32"} | case.options
    directory = write_checkpoint(tmp_path / "source", **options).directory
    case.damage(directory)
    return directory


def assert_says(case: Case, fault: Mapping[str, str]) -> None:
    assert case.where in fault["where"]
    assert case.expected in fault["expected"]
    assert case.found in fault["found"]
    assert case.remedy in fault["remedy"]
    assert len(fault["remedy"].split()) > 3


def test_it_is_refused_by_name_and_nothing_is_left_behind(case: Case, source: Path, tmp_path: Path) -> None:
    """Neither OUT nor `.OUT.partial`; and an OUT that was to be overwritten stays as it was."""
    out = tmp_path / "out"
    with pytest.raises(case.error) as caught:
        convert_checkpoint(source, out)

    assert type(caught.value) is case.error
    assert_says(case, caught.value.faults[0].to_dict())
    assert sorted(tmp_path.iterdir()) == [source]

    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(case.error):
        convert_checkpoint(source, out, overwrite=True)

    assert sorted(tmp_path.iterdir()) == [out, source]
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("old", "old")]


def test_the_command_line_says_the_same_and_exits_with_1(case: Case, source: Path, tmp_path: Path) -> None:
    """`convert` in words and as JSON; `inspect` already, unless it takes the payload to see it: then `verify`."""
    convert = ("convert", source, tmp_path / "out", "--to", "modelopt")
    in_words, as_json = run_cli(*convert), run_cli(*convert, "--json")
    assert (in_words.code, in_words.out) == (1, "")
    assert case.found in in_words.err_words
    assert case.remedy in in_words.err_words
    assert (as_json.code, as_json.err) == (1, "")
    assert as_json.document.keys() == {"schema", "kind", "error", "faults"}
    assert (as_json.document["kind"], as_json.document["error"]) == ("error", case.error.__name__)
    assert_says(case, as_json.document["faults"][0])

    earlier = run_cli("verify" if case.error is PayloadError else "inspect", source, "--json")
    assert earlier.code == 1
    assert_says(case, (earlier.document.get("problems") or earlier.document.get("faults"))[0])
