"""`verify DIR OUT` reads config.json of an engine-build checkpoint: what it says must be what the source says."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite_config, write_checkpoint
from tiny_models import tiny_config

from trtllm_ct.base.errors import CatalogError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocabulary": 97, "layers": 3}
TWO = Parallel(tensor=2)


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
        ("attn_bias", True),
        ("mlp_bias", True),
        ("max_position_embeddings", None),
        ("moe", {"num_experts": 4, "top_k": 2, "normalization_mode": 1}),
    ],
)
def test_a_changed_statement_is_found(key: str, value: object, converted: tuple[Path, Path]) -> None:
    built, out = converted
    document = json.loads((out / "config.json").read_text())
    block, _, inner = key.rpartition(".")
    (document[block] if block else document)[inner] = value
    (out / "config.json").write_text(json.dumps(document))

    faults = verify_checkpoint(built, out).faults

    assert any(key.rpartition(".")[2] in fault.where for fault in faults)


@pytest.mark.parametrize("value", [None, True, "1e-6", 1])
@pytest.mark.parametrize("key", ["norm_epsilon", "max_position_embeddings"])
def test_a_statement_that_the_source_leaves_to_its_class_is_the_number_of_the_class(
    key: str, value: object, converted: tuple[Path, Path]
) -> None:
    built, out = converted
    stated = {"norm_epsilon": "rms_norm_eps"}.get(key, key)
    rewrite_config(built, lambda config: config.pop(stated))
    shutil.rmtree(out)
    convert_checkpoint(built, out, to="engine", parallel=TWO)
    assert verify_checkpoint(built, out).good
    rewrite_config(out, lambda config: config.update({key: value}))

    (fault,) = verify_checkpoint(built, out).faults

    assert fault.where.endswith(f"config.json: {key}")


def test_yarn_without_a_stated_length_starts_from_that_of_the_class(tmp_path: Path) -> None:
    """The class in transformers has a length, which is the original one then, and the directory states it."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    built = write_checkpoint(tmp_path / "in", scheme="dense", config=tiny_config(**SIZES, rope_parameters=rope))
    rewrite_config(built.directory, lambda config: config.pop("max_position_embeddings"))
    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=TWO)

    report = verify_checkpoint(built.directory, tmp_path / "out")

    assert report.good, report.faults
    rewrite_config(tmp_path / "out", lambda config: config["rotary_scaling"].update({ORIGINAL: 4096}))
    assert not verify_checkpoint(built.directory, tmp_path / "out").good


@pytest.mark.parametrize("value", ["missing", None, True, "8", [8], {}, 0, -1, 2**40])
@pytest.mark.parametrize(
    "key",
    ["head_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "dtype", "mapping.tp_size",
     "mapping.pp_size", "mapping.world_size", "quantization.group_size", "quantization"],
)  # fmt: skip
def test_a_value_that_files_can_not_be_read_with_is_an_error_of_ours(
    key: str, value: object, converted: tuple[Path, Path]
) -> None:
    built, out = converted

    def edit(config: dict[str, Any]) -> None:
        block, _, inner = key.rpartition(".")
        holder = config[block] if block else config
        holder[inner] = value
        if value == "missing":
            del holder[inner]

    rewrite_config(out, edit)

    with pytest.raises(CatalogError, match=key.replace(".", r"\.")):
        verify_checkpoint(built, out)


@pytest.mark.parametrize("algo", ["FP8_BLOCK_SCALES", "int8", 8, True, ["FP8"]])
def test_an_unknown_algorithm_is_an_error_of_ours(algo: object, converted: tuple[Path, Path]) -> None:
    built, out = converted
    rewrite_config(out, lambda config: config["quantization"].update(quant_algo=algo))

    with pytest.raises(CatalogError, match=r"quantization\.quant_algo: expected null or an algorithm of engines"):
        verify_checkpoint(built, out)


@pytest.mark.parametrize("block", [None, {"num_experts": 8, "top_k": 2, "normalization_mode": 1}])
def test_a_block_of_experts_that_the_files_contradict_is_found(block: dict[str, int] | None, tmp_path: Path) -> None:
    config = tiny_config("MixtralForCausalLM", **SIZES)
    built = write_checkpoint(tmp_path / "in", scheme="dense", config=config)
    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=TWO)
    rewrite_config(tmp_path / "out", lambda config: config.pop("moe"))
    if block is not None:
        rewrite_config(tmp_path / "out", lambda config: config.update(moe=block))

    where = {fault.where.rpartition(": ")[2] for fault in verify_checkpoint(built.directory, tmp_path / "out").faults}

    assert {"moe", "transformer.layers.0.mlp.fc.weight", "transformer.layers.2.mlp.proj.weight"} <= where


ORIGINAL = "original_max_position_embeddings"
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with a factor of attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ROPES)
def test_every_rotary_embedding_is_good_and_a_changed_one_is_found(name: str, old: bool, tmp_path: Path) -> None:
    block = ROPES[name] if old else {"rope_theta": 5e5, **ROPES[name]}
    more = {"rope_theta": 5e5, "rope_scaling": block, "rope_parameters": None} if old else {"rope_parameters": block}
    built = write_checkpoint(tmp_path / "in", scheme="dense", config=tiny_config(**SIZES | more))
    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=TWO)
    assert verify_checkpoint(built.directory, tmp_path / "out").good
    written = json.loads((tmp_path / "out" / "config.json").read_text())["rotary_scaling"]

    for key in written or {}:
        changed = written | {key: "linear" if key == "rope_type" and name != "linear" else 3.0}
        changed = {**written, "rope_type": "yarn"} if key == "rope_type" and name == "linear" else changed
        rewrite_config(tmp_path / "out", lambda config, changed=changed: config.update(rotary_scaling=changed))
        assert not verify_checkpoint(built.directory, tmp_path / "out").good, key
    rewrite_config(tmp_path / "out", lambda config: config.update(rotary_scaling={"type": "linear", "factor": 2.5}))
    assert not verify_checkpoint(built.directory, tmp_path / "out").good


@pytest.mark.parametrize(
    "scaling",
    [{}, {"type": "yarn"}, {"type": "yarn", "factor": "4"}, {"rope_type": "linear", "factor": None}, {"type": 8},
     {"type": "yarn", "factor": True, "mscale": []}, "linear", [2.0]],
)  # fmt: skip
def test_a_strange_rotary_embedding_is_no_crash(scaling: object, converted: tuple[Path, Path]) -> None:
    built, out = converted
    rewrite_config(built, lambda config: config.update(rope_parameters={"rope_type": "linear", "factor": 2.0}))
    rewrite_config(out, lambda config: config.update(rotary_scaling=scaling))

    assert any("rotary_scaling" in fault.where for fault in verify_checkpoint(built, out).faults)


@pytest.mark.parametrize("base", [None, "1e4", True, [], {}])
def test_a_strange_base_is_no_crash(base: object, converted: tuple[Path, Path]) -> None:
    built, out = converted
    rewrite_config(out, lambda config: config.update(rotary_base=base))

    assert any("rotary_base" in fault.where for fault in verify_checkpoint(built, out).faults)


@pytest.mark.parametrize("block", [{"rope_type": "yarn"}, {"rope_type": "yarn", "factor": "4"}, {"rope_theta": "x"}])
def test_a_strange_embedding_of_the_source_is_no_crash(block: dict[str, object], converted: tuple[Path, Path]) -> None:
    built, out = converted
    rewrite_config(built, lambda config: config.update(rope_parameters=block))

    verify_checkpoint(built, out)


@pytest.mark.parametrize("name", ["rank2.safetensors", "quant_cfg.json"])
def test_a_file_of_another_conversion_is_found(name: str, converted: tuple[Path, Path]) -> None:
    built, out = converted
    assert verify_checkpoint(built, out).good
    (out / name).write_bytes((out / "rank1.safetensors").read_bytes())

    (fault,) = verify_checkpoint(built, out).faults

    assert fault.where == str(out / name)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and its directory for two ranks, which tests copy."""
    folder = tmp_path_factory.mktemp("kept")
    config = tiny_config(hidden=128, intermediate=256)
    built = write_checkpoint(folder / "in", scheme="int8-channel", config=config)
    convert_checkpoint(built.directory, folder / "out", to="engine", parallel=TWO)
    return folder


@pytest.fixture
def converted(kept: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A source and its directory, to be changed."""
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return tmp_path / "in", tmp_path / "out"
