"""Detection: the format of a directory, the evidence for it, and the advice when it is not compressed-tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from trtllm_ct.base.errors import ConfigError, DetectionError
from trtllm_ct.config.detect import FormatDetector
from trtllm_ct.config.quant_methods import describe_method

if TYPE_CHECKING:
    from pathlib import Path

CT = {"quant_method": "compressed-tensors", "config_groups": {}}
GPTQ = {"quant_method": "gptq", "bits": 4}
MODELOPT_FILE = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": {"quant_algo": "FP8"}}


def write(directory: Path, **files: object) -> Path:
    """Write each keyword as `<keyword>.json`."""
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("files", "origin"),
    [
        ({"config": {"quantization_config": CT}}, "config.json: quantization_config"),
        ({"config": {"text_config": {"quantization_config": CT}}}, "config.json: text_config.quantization_config"),
        ({"config": {"compression_config": CT}}, "config.json: compression_config"),
        ({"config": {"text_config": {"compression_config": CT}}}, "config.json: text_config.compression_config"),
        ({"params": {"quantization": CT}}, "params.json: quantization"),
        ({"params": {"quantization_config": CT}}, "params.json: quantization_config"),
        ({"config": {}, "params": {"quantization": CT}}, "params.json: quantization"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_block_is_found_wherever_producers_put_it(tmp_path, files, origin):
    detection = FormatDetector().detect(write(tmp_path, **files))
    assert (detection.method, detection.origin) == ("compressed-tensors", origin)
    assert detection.require_compressed_tensors() == CT
    assert detection.disagreements == ()


@pytest.mark.parametrize("name", ["compressed-tensors", "compressed_tensors", "Compressed-Tensors", " sparseml "])
def test_every_spelling_of_the_method_is_compressed_tensors(tmp_path, name):
    write(tmp_path, config={"quantization_config": {"quant_method": name}})
    assert FormatDetector().detect(tmp_path).method == "compressed-tensors"


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ("compression_config", {"config_groups": {}, "format": "pack-quantized"}),
        ("compression_config", {"sparsity_config": {"format": "sparse-bitmask"}}),
        ("quantization_config", {"sparsity_config": {"format": "sparse-bitmask"}}),
        ("quantization_config", {"sparsity_config": {"format": "sparse-bitmask"}, "version": "0.6.0"}),
    ],
)
def test_early_blocks_without_a_method_are_compressed_tensors(tmp_path, key, block):
    assert FormatDetector().detect(write(tmp_path, config={key: block})).method == "compressed-tensors"


def test_the_extra_level_of_the_first_transformers_integration_is_removed(tmp_path):
    sparsity = {"format": "sparse-bitmask"}
    write(tmp_path, config={"quantization_config": {"quantization_config": CT, "sparsity_config": sparsity}})
    assert FormatDetector().detect(tmp_path).block == {**CT, "sparsity_config": sparsity}
    write(tmp_path, config={"quantization_config": {"quantization_config": None, "sparsity_config": sparsity}})
    assert FormatDetector().detect(tmp_path).block == {"sparsity_config": sparsity}


@pytest.mark.parametrize(
    ("files", "method", "phrase"),
    [
        ({"config": {"quantization_config": GPTQ}}, "gptq", "an AutoGPTQ checkpoint, not compressed-tensors"),
        ({"config": {"quantization_config": {"quant_method": "AWQ"}}}, "awq", "AutoAWQ"),
        ({"config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8", "DeepSeek"),
        ({"config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4", "gpt-oss"),
        ({"config": {"quantization_config": {"quant_method": "auto_round"}}}, "auto_round", "AutoRound"),
        ({"config": {"quantization_config": {"quant_method": "novel"}}}, "novel", "the method 'novel'"),
        ({"config": {"quantization_config": {"load_in_4bit": True}}}, "bitsandbytes", "bitsandbytes"),
        ({"config": {"quantization_config": {"config_groups": {}}}}, "unknown", "unnamed"),
        ({"config": {"quantization_config": {"quant_method": 7}}}, "unknown", "unnamed"),
        ({"config": {"quantization": {"group_size": 64, "bits": 4}}}, "mlx", "MLX"),
        ({"params": {"quantization": {"qformat_weight": "fp8_e4m3"}}}, "mistral-fp8", "Mistral"),
        ({"config": {}, "quantize_config": {"bits": 4}}, "gptq", "AutoGPTQ"),
        ({"config": {}, "quant_config": {"w_bit": 4}}, "awq", "AutoAWQ"),
    ],
)
def test_another_method_is_named_and_comes_with_advice(tmp_path, files, method, phrase):
    detection = FormatDetector().detect(write(tmp_path, **files))
    assert detection.method == method
    assert phrase in detection.description
    with pytest.raises(DetectionError) as caught:
        detection.require_compressed_tensors()
    (fault,) = caught.value.faults
    assert phrase in fault.found
    assert fault.remedy == describe_method(method).remedy
    assert fault.where == str(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "modelopt", "config_groups": {"group_0": {}}}},
        {"quantization_config": {"quant_method": "modelopt_fp4"}},
        {"quantization_config": {"producer": {"name": "modelopt"}, "config_groups": {}}},
        {"quantization_config": {"quant_algo": "NVFP4"}},
    ],
)
def test_config_groups_do_not_make_a_modelopt_block_compressed_tensors(tmp_path, config):
    assert FormatDetector().detect(write(tmp_path, config=config)).method == "modelopt"


@pytest.mark.parametrize("content", [MODELOPT_FILE, {"quantization": {"quant_algo": "FP8"}}])
def test_hf_quant_config_alone_means_modelopt(tmp_path, content):
    """This is how a directory converted by this package looks."""
    detection = FormatDetector().detect(write(tmp_path, config={}, hf_quant_config=content))
    assert (detection.method, detection.origin) == ("modelopt", "hf_quant_config.json")


@pytest.mark.parametrize("algorithm", [None, "W4A16_AWQ", "MIXED_PRECISION"])
def test_what_trtllm_build_reads_is_no_checkpoint_that_tensorrt_llm_loads(tmp_path, algorithm):
    """Target engine writes such directories; converters of TensorRT-LLM and ModelOpt too."""
    config = {"architecture": "LlamaForCausalLM", "quantization": {"quant_algo": algorithm}, "mapping": {"tp_size": 1}}

    detection = FormatDetector().detect(write(tmp_path, config=config))

    assert (detection.method, detection.origin) == ("trtllm-build", "config.json: quantization")
    with pytest.raises(DetectionError, match=r"an engine-build checkpoint, .*Build an engine of it with trtllm-build"):
        detection.require_compressed_tensors()


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": {}}]
)
def test_no_block_means_no_quantization(tmp_path, config):
    detection = FormatDetector().detect(write(tmp_path, config=config))
    assert (detection.method, detection.block, detection.origin) == (None, None, None)
    assert detection.evidence[0].read_as is None
    with pytest.raises(DetectionError, match=r"unquantized.*nothing to convert"):
        detection.require_compressed_tensors()


def test_priorities_of_methods_and_all_disagreements_are_reported(tmp_path):
    write(
        tmp_path,
        config={"quantization_config": GPTQ, "text_config": {"quantization_config": CT}},
        hf_quant_config=MODELOPT_FILE,
    )
    detection = FormatDetector().detect(tmp_path)
    assert detection.origin == "config.json: text_config.quantization_config"
    assert [entry.read_as for entry in detection.evidence] == ["compressed-tensors", "modelopt", "gptq"]
    assert len(detection.disagreements) == 2
    assert "hf_quant_config.json says modelopt" in detection.disagreements[0]
    assert "config.json: quantization_config says gptq" in detection.disagreements[1]

    write(tmp_path, config={"quantization_config": GPTQ})
    assert FormatDetector().detect(tmp_path).method == "modelopt"


def test_two_compressed_tensors_blocks_that_differ_are_reported_and_the_first_counts(tmp_path):
    text_block = {**CT, "format": "pack-quantized", "ignore": ["lm_head"]}
    write(tmp_path, config={"quantization_config": CT, "text_config": {"quantization_config": text_block}})
    detection = FormatDetector().detect(tmp_path)
    assert detection.block == CT
    assert detection.disagreements[0].endswith("differ in format, ignore; the first one counts")


@pytest.mark.parametrize(("algorithm", "count"), [("fp8", 0), ("NVFP4", 1)])
def test_modelopt_file_and_block_must_agree_in_the_algorithm(tmp_path, algorithm, count):
    block = {"quant_method": "modelopt", "quant_algo": algorithm}
    write(tmp_path, config={"quantization_config": block}, hf_quant_config=MODELOPT_FILE)
    assert len(FormatDetector().detect(tmp_path).disagreements) == count


def test_the_same_gptq_settings_in_a_side_file_are_no_disagreement(tmp_path):
    write(tmp_path, config={"quantization_config": GPTQ}, quantize_config={"bits": 4, "damp_percent": 0.01})
    assert FormatDetector().detect(tmp_path).disagreements == ()


def test_the_json_form_is_complete_and_leaves_the_block_out(tmp_path):
    document = FormatDetector().detect(write(tmp_path, config={"quantization_config": CT})).to_dict()
    assert json.loads(json.dumps(document)) == {
        "method": "compressed-tensors",
        "description": "a compressed-tensors checkpoint",
        "origin": "config.json: quantization_config",
        "evidence": [
            {
                "file": "config.json",
                "key": "quantization_config.quant_method",
                "found": '"compressed-tensors"',
                "read_as": "compressed-tensors",
            }
        ],
        "disagreements": [],
    }


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("missing", "Check the path"),
        ("file.txt", "Give the directory that holds config.json"),
        ("empty", "interrupted download"),
        ("gguf", "llama.cpp"),
        ("lora", "Merge the adapter"),
        ("parent", r"inside instead: one, two$"),
    ],
)
def test_a_path_that_is_no_checkpoint_directory_is_refused_with_advice(tmp_path, name, remedy):
    (tmp_path / "file.txt").write_text("")
    for folder in ("empty", "gguf", "lora", "parent/one", "parent/two"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "gguf" / "model.gguf").write_text("")
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    for folder in ("one", "two"):
        (tmp_path / "parent" / folder / "config.json").write_text("{}")
    with pytest.raises(DetectionError, match=remedy):
        FormatDetector().detect(tmp_path / name)


def test_a_hub_name_is_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DetectionError, match=r"hf download RedHatAI/Qwen3-8B-FP8 --local-dir"):
        FormatDetector().detect("RedHatAI/Qwen3-8B-FP8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "readable JSON"),
        (b'{"a": 1,}', "line 1 column"),
        (b"\xff\xfe", "readable JSON"),
        (b"[" * 100_000, "readable JSON"),
        (b"[]", "expected a JSON object, found a JSON value of type list"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b'{"quantization_config": "gptq"}', r"config\.json: quantization_config: expected a JSON object"),
        (b'{"text_config": [1]}', r"config\.json: text_config: expected a JSON object"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        FormatDetector().detect(tmp_path)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf{}")
    assert FormatDetector().detect(tmp_path).method is None


def test_detection_and_reading_import_no_torch():
    code = "import sys; from trtllm_ct.config import detect, reader, match; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.shared
def test_real_directories_are_recognised(shared):
    """Every checkpoint and every ModelOpt export has the format that its folder name says; no blocks disagree."""
    for directory in sorted((shared / "checkpoints").glob("*/config.json")):
        detection = FormatDetector().detect(directory.parent)
        assert detection.method == (None if directory.parent.name == "_base" else "compressed-tensors")
        assert detection.disagreements == ()
    for directory in sorted((shared / "modelopt-exports").glob("*/config.json")):
        detection = FormatDetector().detect(directory.parent)
        assert (detection.method, detection.disagreements) == ("modelopt", ())
