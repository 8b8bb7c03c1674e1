"""convert_checkpoint writes a complete model directory or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Built, rewrite, tiny_config, write_checkpoint
from on_tensors import on_tensors
from safetensors.torch import load_file
from torch import Tensor

from trtllm_ct.base.errors import DetectionError, PayloadError, PlanError, UsageError
from trtllm_ct.base.version import __version__
from trtllm_ct.checkpoint.work_folder import JOURNAL
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.layouts import rounding as rounding_layout
from trtllm_ct.pipeline.loader import CompressedTensorsWeightLoader

round_once = on_tensors(rounding_layout.round_once)

MIXED = {"o_proj": "int8-g32", "down_proj": "int8-channel"}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A checkpoint with native, dequantized and plain modules."""
    return write_checkpoint(tmp_path_factory.mktemp("source"), scheme=MIXED, kv=True, tokenizer=True)


def load(out: Path) -> dict[str, Tensor]:
    return {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def exact(built: Built, names: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: round_once(built.dense[name], dtype) for name in names}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


class TestOutput:
    def test_a_modelopt_directory_holds_the_native_layout(self, built: Built, tmp_path: Path):
        convert_checkpoint(built.directory, tmp_path / "out")

        assert same(load(tmp_path / "out"), CompressedTensorsWeightLoader().load_weights(built.directory))

    def test_a_dense_directory_holds_exact_values_rounded_once(self, built: Built, tmp_path: Path):
        convert_checkpoint(built.directory, tmp_path / "out", to="dense")

        assert same(load(tmp_path / "out"), exact(built, built.dense, torch.bfloat16))

    @pytest.mark.parametrize("as_type", [str, Path])
    def test_missing_parent_directories_are_created(self, built: Built, tmp_path: Path, as_type: type):
        report = convert_checkpoint(as_type(built.directory), as_type(tmp_path / "deep" / "out"))

        assert (tmp_path / "deep" / "out" / "config.json").is_file()
        assert report.out == tmp_path / "deep" / "out"

    def test_hf_quant_config_names_modelopt_as_producer(self, built: Built, tmp_path: Path):
        """Readers check the name of the producer; the real writer is named under `converter`."""
        report = convert_checkpoint(built.directory, tmp_path / "out")

        document = read_json(tmp_path / "out" / "hf_quant_config.json")
        assert document["producer"]["name"] == "modelopt"
        assert document["converter"] == {"name": "trtllm-ct", "version": __version__}
        assert document["quantization"] == report.plan.quant_config.to_dict()
        assert document["quantization"]["kv_cache_quant_algo"] == "FP8"
        assert document["quantization"]["quant_algo"] == "W8A16"

    def test_config_json_names_no_compressed_tensors(self, built: Built, tmp_path: Path):
        convert_checkpoint(built.directory, tmp_path / "out")

        config = read_json(tmp_path / "out" / "config.json")
        assert "quantization_config" not in config
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
        assert {key: config[key] for key in built.config if key != "quantization_config"} == {
            key: value for key, value in built.config.items() if key != "quantization_config"
        }

    @pytest.mark.parametrize(("scheme", "to"), [("int8-channel", "dense"), ("int8-g32", "modelopt")])
    def test_without_a_native_module_there_is_no_hf_quant_config(self, tmp_path: Path, scheme: str, to: str):
        write_checkpoint(tmp_path / "source", scheme=scheme)

        convert_checkpoint(tmp_path / "source", tmp_path / "out", to=to)

        assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["config.json", "model.safetensors"]

    def test_side_files_are_carried_and_weights_in_other_formats_are_not(self, tmp_path: Path):
        source = write_checkpoint(tmp_path / "source", tokenizer=True).directory
        for name in ("chat_template.jinja", "generation_config.json", "modeling_x.py", "recipe.yaml", "params.json"):
            (source / name).write_text("{}")
        (source / "pytorch_model.bin").touch()
        (source / "assets").mkdir()
        (source / "assets" / "vocabulary.txt").touch()

        report = convert_checkpoint(source, tmp_path / "out", carry=["assets"])

        carried = (
            "assets/vocabulary.txt",
            "chat_template.jinja",
            "generation_config.json",
            "recipe.yaml",
            "tokenizer.json",
            "tokenizer_config.json",
        )
        assert report.carried_files == carried
        assert report.left_out_files == ("modeling_x.py",)
        assert report.code_files == ()
        assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in carried)
        assert not (tmp_path / "out" / "params.json").exists()
        assert not (tmp_path / "out" / "pytorch_model.bin").exists()

    @pytest.mark.parametrize("carry", ["assets/*", ["assets/*"], iter(["assets/*"])])
    def test_one_pattern_carries_what_it_matches_and_nothing_else(self, tmp_path: Path, carry: Any):
        source = write_checkpoint(tmp_path / "source").directory
        (source / "secret.key").write_text("secret")
        (source / "assets").mkdir()
        (source / "assets/picture.png").touch()

        report = convert_checkpoint(source, tmp_path / "out", carry=carry)

        assert report.carried_files == ("assets/picture.png",)
        assert report.left_out_files == ("secret.key",)
        assert not [warning for warning in report.warnings if "--carry" in warning]

    @pytest.mark.parametrize("carry", ["", "../x", "./assets/*", "assets//*", "/", ["assets", ".."], None, 3, [b"a"]])
    def test_a_pattern_that_matches_no_name_is_refused(self, built: Built, tmp_path: Path, carry: Any):
        with pytest.raises(UsageError, match="carry: expected"):
            convert_checkpoint(built.directory, tmp_path / "out", carry=carry)

        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("to", ["modelopt", "engine"])
    def test_a_pattern_that_no_copied_file_has_is_named(self, tmp_path: Path, to: str):
        source = write_checkpoint(tmp_path / "source", scheme="int8-channel").directory

        report = convert_checkpoint(source, tmp_path / "out", to=to, carry=["asets/*", "model.safetensors"])

        named = [warning for warning in report.warnings if warning.startswith("--carry")]
        assert [warning.split(":")[0] for warning in named] == ["--carry asets/*", "--carry model.safetensors"]

    def test_force_without_overwrite_is_refused(self, built: Built, tmp_path: Path):
        """It would replace nothing."""
        with pytest.raises(UsageError, match="--force: expected --overwrite beside it"):
            convert_checkpoint(built.directory, tmp_path / "out", force=True)

        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("keep", [None, 10**9])
    def test_room_for_downloads_of_a_directory_is_said_to_have_no_effect(
        self, built: Built, tmp_path: Path, keep: int | None
    ):
        report = convert_checkpoint(built.directory, tmp_path / "out", keep=keep)

        assert any(warning.startswith("--keep") for warning in report.warnings) is (keep is not None)

    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_a_tokenizer_of_transformers_5_is_readable_by_transformers_4(self, tmp_path: Path, to: str):
        source = write_checkpoint(tmp_path / "source", tokenizer=True).directory
        stored = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "bos_token": "<s>"}
        (source / "tokenizer_config.json").write_text(json.dumps(stored))

        convert_checkpoint(source, tmp_path / "out", to=to)

        assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": ["<a>"],
            "bos_token": "<s>",
        }

    def test_a_tokenizer_class_that_only_transformers_5_has_is_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        source = write_checkpoint(tmp_path / "source", tokenizer=True).directory
        (source / "tokenizer_config.json").write_text('{"tokenizer_class": "MistralCommonBackend"}')

        convert_checkpoint(source, tmp_path / "out")

        assert "MistralCommonBackend" in caplog.text
        assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"tokenizer_class": "MistralCommonBackend"}'

    def test_a_damaged_tokenizer_config_is_copied(self, tmp_path: Path):
        source = write_checkpoint(tmp_path / "source", tokenizer=True).directory
        (source / "tokenizer_config.json").write_text("{")

        convert_checkpoint(source, tmp_path / "out")

        assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{"

    def test_weights_are_split_at_the_shard_size(self, built: Built, tmp_path: Path):
        report = convert_checkpoint(built.directory, tmp_path / "out", max_shard_bytes=30_000)

        shards = sorted((tmp_path / "out").glob("*.safetensors"))
        index = read_json(tmp_path / "out" / "model.safetensors.index.json")
        assert len(shards) > 2
        assert report.weight_files == (*(path.name for path in shards), "model.safetensors.index.json")
        assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= 30_000 for path in shards)
        assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
        assert index["metadata"]["total_size"] == report.plan.delivered_bytes
        assert same(load(tmp_path / "out"), CompressedTensorsWeightLoader().load_weights(built.directory))

    def test_the_source_is_not_touched(self, built: Built, tmp_path: Path):
        before = {path.name: path.read_bytes() for path in built.directory.iterdir()}

        convert_checkpoint(built.directory, tmp_path / "out")

        assert {path.name: path.read_bytes() for path in built.directory.iterdir()} == before


class TestDtype:
    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [("auto", torch.bfloat16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)],
    )
    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_dequantized_modules_are_exact_in_the_requested_dtype(
        self, built: Built, tmp_path: Path, to: str, dtype: str, expected: torch.dtype
    ):
        convert_checkpoint(built.directory, tmp_path / "out", to=to, dtype=dtype)

        names = [name for name in built.dense if "o_proj" in name]
        tensors = load(tmp_path / "out")
        assert same({name: tensors[name] for name in names}, exact(built, names, expected))
        assert tensors["model.norm.weight"].dtype is torch.bfloat16

    @pytest.mark.parametrize(("to", "expected"), [("modelopt", "bfloat16"), ("dense", "float32")])
    def test_float32_is_the_dtype_of_a_dense_model_only(self, built: Built, tmp_path: Path, to: str, expected: str):
        convert_checkpoint(built.directory, tmp_path / "out", to=to, dtype="float32")

        assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == expected

    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_float16_casts_every_plain_tensor(self, built: Built, tmp_path: Path, to: str):
        convert_checkpoint(built.directory, tmp_path / "out", to=to, dtype="float16")

        tensors = load(tmp_path / "out")
        plain = [name for name in built.dense if name in tensors and tensors[name].dtype is not torch.int8]
        assert same({name: tensors[name] for name in plain}, exact(built, plain, torch.float16))
        assert len(plain) == len(built.dense) - (2 if to == "modelopt" else 0)
        assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "float16"

    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_float16_casts_plain_tensors_that_are_stored_wider(self, tmp_path: Path, to: str):
        def widened(stored: dict[str, Tensor]) -> None:
            stored["model.norm.weight"] = stored["model.norm.weight"].float() + 2**-20

        built = write_checkpoint(tmp_path / "in", scheme="int4-g64", edit=widened)
        convert_checkpoint(built.directory, tmp_path / "out", to=to, dtype="float16")

        norm = load(tmp_path / "out")["model.norm.weight"]
        assert norm.dtype is torch.float16
        assert torch.equal(norm, built.stored["model.norm.weight"].to(torch.float16))

    def test_a_plain_value_beyond_float16_is_named_with_its_index(self, tmp_path: Path):
        def enlarge(stored: dict[str, Tensor]) -> None:
            stored["model.layers.1.mlp.up_proj.weight"][5, 7] = 70000

        write_checkpoint(tmp_path / "source", scheme=MIXED, edit=enlarge)

        with pytest.raises(PayloadError) as caught:
            convert_checkpoint(tmp_path / "source", tmp_path / "out", dtype="float16")

        (fault,) = caught.value.faults
        assert fault.where == "model.layers.1.mlp.up_proj.weight[5, 7]"
        assert fault.expected == "a value within the range of float16"
        assert fault.found == "70144"
        assert fault.remedy == "Convert with --dtype bfloat16 or float32."
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    def test_a_dequantized_value_beyond_float16_is_named_with_its_index(self, tmp_path: Path):
        write_checkpoint(tmp_path / "source", scheme={"down_proj": "int8-plain-g32"})

        def enlarge(stored: dict[str, Tensor]) -> None:
            stored[f"{DOWN}.weight"][3].zero_()
            stored[f"{DOWN}.weight"][3, 40] = 100
            stored[f"{DOWN}.weight_scale"][3, 1] = 1000

        rewrite(tmp_path / "source", enlarge)

        with pytest.raises(
            PayloadError, match=r"down_proj\.weight\[3, 40\]: expected a value within the range of float16"
        ):
            convert_checkpoint(tmp_path / "source", tmp_path / "out", dtype="float16")

    def test_an_infinite_stored_value_is_not_a_fault_of_the_cast(self, tmp_path: Path):
        def enlarge(stored: dict[str, Tensor]) -> None:
            stored["model.norm.weight"][0] = float("inf")

        write_checkpoint(tmp_path / "source", edit=enlarge)

        convert_checkpoint(tmp_path / "source", tmp_path / "out", dtype="float16")

        assert load(tmp_path / "out")["model.norm.weight"][0].isinf()


class TestRefusals:
    """Arguments that are refused before anything is read or written."""

    @pytest.mark.parametrize(
        ("options", "where", "expected"),
        [
            ({"to": "reference"}, "--to", "modelopt or dense or engine"),
            ({"dtype": "int8"}, "dtype", "auto or bfloat16 or float16 or float32"),
            ({"max_shard_bytes": 0}, "--max-shard-size", "at least one byte"),
        ],
    )
    def test_arguments_that_cannot_work(self, tmp_path: Path, options: dict[str, Any], where: str, expected: str):
        write_checkpoint(tmp_path / "source")

        with pytest.raises(UsageError) as caught:
            convert_checkpoint(tmp_path / "source", tmp_path / "out", **options)

        (fault,) = caught.value.faults
        assert fault.where == where
        assert expected in fault.expected
        assert not (tmp_path / "out").exists()

    def test_an_existing_output_is_kept(self, built: Built, tmp_path: Path):
        (tmp_path / "out").mkdir()

        with pytest.raises(UsageError, match="replace it with --overwrite"):
            convert_checkpoint(built.directory, tmp_path / "out")

        assert not list((tmp_path / "out").iterdir())

    @pytest.mark.parametrize("inside", [".", "out", "deep/out"])
    def test_an_output_inside_the_source_is_refused(self, tmp_path: Path, inside: str):
        source = write_checkpoint(tmp_path / "source").directory

        with pytest.raises(UsageError, match="an output directory apart from the source"):
            convert_checkpoint(source, source / inside, overwrite=True)

        assert (source / "model.safetensors").is_file()

    def test_strict_refuses_to_dequantize(self, built: Built, tmp_path: Path):
        with pytest.raises(PlanError, match="a native mode at target modelopt"):
            convert_checkpoint(built.directory, tmp_path / "out", strict=True)

        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("out", ["out", "deep/deeper/out"])
    def test_a_missing_source_is_refused(self, tmp_path: Path, out: str):
        """Parent directories that were created for the output are removed."""
        with pytest.raises(DetectionError, match="no such directory"):
            convert_checkpoint(tmp_path / "nowhere", tmp_path / out)

        assert not list(tmp_path.iterdir())


def test_overwrite_replaces_the_whole_directory(built: Built, tmp_path: Path) -> None:
    """No file of the old directory stays; otherwise its shards would be loaded together with the new ones."""
    out = tmp_path / "out"
    convert_checkpoint(built.directory, out, max_shard_bytes=100_000)
    assert len(list(out.glob("model-*"))) > 1

    convert_checkpoint(built.directory, out, overwrite=True)

    assert not list(out.glob("model-*"))
    assert (out / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_files_of_a_crashed_run_are_removed(built: Built, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / JOURNAL).touch()
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")

    convert_checkpoint(built.directory, tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestReport:
    def test_modes_bytes_files_and_reasons(self, built: Built, tmp_path: Path):
        report = convert_checkpoint(built.directory, tmp_path / "out")

        assert report.modes == {"W8A16": 2, "dequantized": 2}
        document = json.loads(json.dumps(report.to_dict()))
        assert document["target"] == "modelopt"
        assert document["modes"] == {"W8A16": 2, "dequantized": 2}
        assert document["dequantized"] == {
            f"model.layers.{layer}.self_attn.o_proj": "W8A16 holds no scale per group" for layer in range(2)
        }
        assert document["stored_bytes"] == sum(tensor.nbytes for tensor in built.stored.values())
        assert document["delivered_bytes"] == sum(tensor.nbytes for tensor in load(tmp_path / "out").values())
        assert document["weight_files"] == ["model.safetensors"]
        assert document["seconds"] > 0

    def test_progress_counts_every_delivered_byte(self, built: Built, tmp_path: Path):
        progress: list[int] = []
        plans = []

        report = convert_checkpoint(
            built.directory, tmp_path / "out", on_start=lambda plan: plans.append(plan) or progress.append
        )

        assert plans == [report.plan]
        assert sum(progress) == report.plan.delivered_bytes

    def test_an_error_in_the_progress_callback_stops_the_conversion(self, built: Built, tmp_path: Path):
        def stop(nbytes: int) -> None:
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            convert_checkpoint(built.directory, tmp_path / "out", on_start=lambda plan: stop)

        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
        assert convert_checkpoint(built.directory, tmp_path / "out").resumed_bytes > 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_checkpoint_converts_to_the_same_bytes(tmp_path: Path) -> None:
    """The output does not depend on the shards of the source, their order or the directories."""
    config = tiny_config()
    for shards in (1, 3):
        write_checkpoint(tmp_path / f"source{shards}", config=config, scheme="int4-g64", shards=shards)
        convert_checkpoint(tmp_path / f"source{shards}", tmp_path / f"out{shards}")

    one, three = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / f"out{shards}").iterdir())} for shards in (1, 3)
    )
    assert one == three
