"""Arguments, configurations and processes of the double."""

from __future__ import annotations

import json
import os
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch

import trtllm_ct
from trtllm_ct import convert_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO = Path(trtllm_ct.__file__).parent / "cli" / "demo_data"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("double") / "demo"
    convert_checkpoint(DEMO, out)
    return out


@pytest.fixture(params=engine_double.GENERATIONS)
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    with engine_double.installed(request.param) as module:
        yield module


@pytest.fixture
def newest() -> Iterator[Any]:
    with engine_double.installed("newest") as module:
        yield module


@pytest.fixture
def old() -> Iterator[Any]:
    with engine_double.installed("old") as module:
        yield module


def directory_with(tmp_path: Path, quantization: dict[str, Any] | None = None, **config: Any) -> Path:
    document = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | config
    (tmp_path / "config.json").write_text(json.dumps(document))
    if quantization is not None:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return tmp_path


def read(directory: Path, **keywords: Any) -> Any:
    from tensorrt_llm._torch.model_config import ModelConfig

    return ModelConfig.from_pretrained(directory, **keywords)


def test_generations_are_removed_completely() -> None:
    import importlib.util

    with engine_double.installed("old") as first:
        assert first.__version__.startswith("1.1")
    with engine_double.installed("newest") as second:
        assert second.__version__.startswith("1.4")
        assert os.environ["TLLM_DOUBLE_GENERATION"] == "newest"
    assert "TLLM_DOUBLE_GENERATION" not in os.environ
    assert importlib.util.find_spec("tensorrt_llm") is None


def test_releases_differ_in_their_members() -> None:
    import inspect

    seen = {}
    for generation in engine_double.GENERATIONS:
        with engine_double.installed(generation):
            from tensorrt_llm._torch.models.checkpoints.base_weight_loader import BaseWeightLoader
            from tensorrt_llm.quantization import QuantAlgo

            takes_mapping = "mapping" in inspect.signature(BaseWeightLoader.load_weights).parameters
            seen[generation] = (takes_mapping, "MXFP8" in QuantAlgo.__members__)
    assert seen == {"old": (False, False), "mid": (True, False), "newest": (True, True)}


def test_a_checkpoint_format_drops_the_loader(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    from tensorrt_llm.llmapi import TorchLlmArgs

    args = TorchLlmArgs.from_kwargs(model="m", checkpoint_loader=object(), checkpoint_format="HF")
    assert args.checkpoint_loader is None
    assert "checkpoint_loader is ignored" in caplog.text
    assert TorchLlmArgs.from_kwargs(model="m").checkpoint_format == "HF"
    assert TorchLlmArgs.from_kwargs(model="m", checkpoint_loader=object()).checkpoint_format is None


def test_unknown_arguments_raise(old: Any) -> None:
    with pytest.raises(ValueError, match="force_dynamic_quantization"):
        old.LLM(model=DEMO, force_dynamic_quantization=True)


def test_the_parent_fails_before_any_loader_is_called(newest: Any) -> None:
    with pytest.raises(TypeError, match="NoneType"):
        newest.LLM(model=DEMO, checkpoint_loader=object())


def test_unknown_formats_are_named(newest: Any, converted: Path) -> None:
    with pytest.raises(ValueError, match="weight loader for safe_tensors not found"):
        newest.LLM(model=converted, skip_tokenizer_init=True, checkpoint_format="safe_tensors")


def test_an_overriding_block_reaches_parent_and_worker(newest: Any, tmp_path: Path) -> None:
    directory = directory_with(tmp_path, quantization_config={"quant_method": "compressed-tensors"})
    flat = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    config = read(directory, model_kwargs={"quantization_config": flat})
    assert (config.quant_config.quant_algo, config.quant_config.exclude_modules) == ("FP8", ["lm_head"])


def test_a_loaded_configuration_is_frozen(engine: Any, tmp_path: Path) -> None:
    config = read(directory_with(tmp_path))
    with pytest.raises(AttributeError, match="frozen"):
        config.moe_backend = "TRTLLM"
    config.quant_config = config.quant_config


def test_old_releases_read_mixed_precision_from_quant_cfg(tmp_path: Path) -> None:
    layers = {"model.layers.0.mlp.down_proj": {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False}}
    whole = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}
    directory = directory_with(tmp_path, whole)
    with engine_double.installed("newest"):
        assert read(directory).quant_config_dict["model.layers.0.mlp.down_proj"].group_size == 64
    for generation in ("old", "mid"):
        with engine_double.installed(generation):
            (tmp_path / "quant_cfg.json").unlink(missing_ok=True)
            with pytest.raises(FileNotFoundError, match=r"quant_cfg\.json"):
                read(directory)
            (tmp_path / "quant_cfg.json").write_text(json.dumps(whole))
            assert read(directory).quant_config_dict["model.layers.0.mlp.down_proj"].group_size == 64


@pytest.mark.parametrize(
    ("entry", "newer"), [("model.layers.0.mlp*", True), ("model.layers.0", True), ("re:.*down_proj", True)]
)
def test_exclusions_match_patterns_and_ancestors_in_newer_releases_only(entry: str, newer: bool) -> None:
    found = {}
    for generation in engine_double.GENERATIONS:
        with engine_double.installed(generation):
            from tensorrt_llm.models.modeling_utils import QuantConfig

            config = QuantConfig(exclude_modules=[entry])
            found[generation] = config.is_module_excluded_from_quantization("model.layers.0.mlp.down_proj")
    assert found == {"old": entry.endswith("*"), "mid": entry.endswith("*"), "newest": newer}


def test_unknown_fields_of_a_quant_config(old: Any) -> None:
    from tensorrt_llm.models.modeling_utils import QuantConfig

    with pytest.raises(TypeError):
        QuantConfig(actorder="group")
    QuantConfig().actorder = "group"
    with engine_double.installed("newest"):
        from tensorrt_llm.models.modeling_utils import QuantConfig as StrictQuantConfig

        with pytest.raises(ValueError, match="Extra inputs"):
            StrictQuantConfig(actorder="group")
        with pytest.raises(ValueError, match="Extra inputs"):
            StrictQuantConfig().actorder = "group"


def test_the_mode_of_a_config_is_cached_on_first_use(engine: Any) -> None:
    from tensorrt_llm.models.modeling_utils import QuantConfig

    config = QuantConfig()
    assert not config.layer_quant_mode.has_any_quant()
    config.quant_algo = "FP8"
    assert not config.layer_quant_mode.has_any_quant()


def modules_of(engine: Any, directory: Path, **layers: str) -> dict[str, bool]:
    """Return the Linears of one layer that are quantized by entries with these keys (`__` stands for a dot)."""
    from tensorrt_llm._torch.models.modeling_decoder import Decoder
    from tensorrt_llm._torch.modules.linear import Linear

    config = read(directory)
    config._frozen = False
    from tensorrt_llm.models.modeling_utils import QuantConfig

    config.quant_config_dict = {
        name.replace("__", "."): QuantConfig(quant_algo=algo) for name, algo in layers.items()
    } or None
    named = Decoder(config).get_submodule("model.layers.0").named_modules()
    return {name.rpartition(".")[2]: module.has_any_quant for name, module in named if isinstance(module, Linear)}


def test_only_fused_linears_accept_prefixes_in_entries(engine: Any, converted: Path) -> None:
    names = {"q_proj": "self_attn", "o_proj": "self_attn", "gate_proj": "mlp", "down_proj": "mlp"}
    entries = {f"language_model__model__layers__0__{parent}__{leaf}": "FP8" for leaf, parent in names.items()}
    quantized = modules_of(engine, plain(converted), **entries)
    assert quantized == {"qkv_proj": True, "o_proj": False, "gate_up_proj": True, "down_proj": False}


def plain(converted: Path) -> Path:
    """The same model without any quantization config."""
    directory = converted.parent / "plain"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text((converted / "config.json").read_text())
    return directory


def test_one_excluded_member_leaves_a_fused_linear_dense(engine: Any, converted: Path, tmp_path: Path) -> None:
    quantization = {"quant_algo": "FP8", "exclude_modules": ["model.layers.0.self_attn.k_proj"]}
    directory = directory_with(tmp_path, quantization, **json.loads((converted / "config.json").read_text()))
    quantized = modules_of(engine, directory)
    assert quantized == {"qkv_proj": False, "o_proj": True, "gate_up_proj": True, "down_proj": True}


def weights(**more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None} | more


TOKEN = {"strategy": "token", "group_size": None}
PARSED: list[tuple[str, dict[str, Any], dict[str, Any] | None, Any]] = [
    ("AB", weights(), TOKEN, "FP8_PER_CHANNEL_PER_TOKEN"),
    ("AB", weights(type="int"), TOKEN, "FP8_PER_CHANNEL_PER_TOKEN"),
    ("AB", weights(strategy="block"), {"strategy": "group", "group_size": 128}, "FP8_BLOCK_SCALES"),
    ("AB", weights(strategy="block"), {"strategy": "group", "group_size": 64}, "Unsupported group_size: 64"),
    ("AB", weights(), {"strategy": "tensor"}, "Unsupported inputs_quant_strategy: tensor"),
    ("AB", weights(strategy="group", group_size=32), {"strategy": "group"}, "Unsupported weights_quant_strategy"),
    ("AB", weights(num_bits=4, type="int", strategy="group"), TOKEN, "Unsupported quant_bits: 4"),
    ("AB", weights(num_bits=4, strategy="tensor_group", group_size=16), {"strategy": "tensor_group"}, "NVFP4"),
    ("AB", weights(num_bits=4, strategy="tensor_group", group_size=32), {"strategy": "tensor_group"}, "16 for NVFP4"),
    ("B", weights(num_bits=4, strategy="group", group_size=32), None, "W4A16_MXFP4"),
]


@pytest.mark.parametrize(("parsers", "args", "inputs", "outcome"), PARSED)
def test_schemes_as_the_parser_takes_them(
    parsers: str, args: dict[str, Any], inputs: dict[str, Any] | None, outcome: str
) -> None:
    block = {"config_groups": {"group_0": {"weights": args, "input_activations": inputs, "targets": ["Linear"]}}}
    for parser in parsers:
        with engine_double.installed("newest", ct_parser=parser):
            from tensorrt_llm.models.modeling_utils import QuantConfig
            from tensorrt_llm.models.quant_config_utils import update_quant_config_from_compressed_tensors
            from tensorrt_llm.quantization import QuantAlgo

            config = QuantConfig()
            if outcome in QuantAlgo.__members__:
                update_quant_config_from_compressed_tensors(config, block)
                assert config.quant_algo == outcome
            else:
                with pytest.raises(ValueError, match=outcome):
                    update_quant_config_from_compressed_tensors(config, block)


def test_only_the_last_parser_reads_several_groups_and_only_with_module_names() -> None:
    group = {"weights": weights(), "input_activations": TOKEN}
    groups = {"one": group | {"targets": ["re:.*q_proj"]}, "two": group | {"targets": ["Linear"]}}
    with engine_double.installed("newest", ct_parser="C"):
        from tensorrt_llm.models.modeling_utils import QuantConfig
        from tensorrt_llm.models.quant_config_utils import update_quant_config_from_compressed_tensors as update

        update(config := QuantConfig(), {"config_groups": groups})
        assert config.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN"
        with pytest.raises(ValueError, match="matched no checkpoint module"):
            update(QuantConfig(), {"config_groups": groups}, module_names=["a.q_proj"])


def test_a_linear_method_can_be_installed_in_get_quant_method(
    newest: Any, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm._torch.modules import linear

    stock, chosen = linear.get_quant_method, []

    def select(quant_config: Any = None) -> Any:
        chosen.append(quant_config)
        return stock(quant_config)

    monkeypatch.setattr(linear, "get_quant_method", select)
    newest.LLM(model=converted, skip_tokenizer_init=True)
    assert len(chosen) == 4 * 4 + 1


def test_a_draft_model_is_loaded_by_the_same_loader_from_its_own_directory(engine: Any, converted: Path) -> None:
    from tensorrt_llm.llmapi import DraftTargetDecodingConfig

    draft = DraftTargetDecodingConfig(speculative_model_dir=str(converted))
    with engine.LLM(model=converted, skip_tokenizer_init=True, speculative_config=draft) as llm:
        assert torch.equal(llm.logits([5, 6]), llm.logits([5, 6], draft=True))


# Processes.

LOADER = """
import os
from tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader import HfCheckpointLoader

class TellingLoader(HfCheckpointLoader):
    def load_config(self, checkpoint_dir, **kwargs):
        names = [name for name in ("TRTLLM_CT_SEEN", "CT_UNSEEN") if name in os.environ]
        raise ValueError(f"process {os.getpid()} has {names}")
"""


def test_workers_get_pickled_arguments_and_engine_variables_only(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_of_a_test.py").write_text(dedent(LOADER))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRTLLM_CT_SEEN", "1")
    monkeypatch.setenv("CT_UNSEEN", "1")
    with engine_double.installed("old", in_process=False, importers=["plugin_of_a_test"]) as engine:
        from plugin_of_a_test import TellingLoader

        with pytest.raises(RuntimeError, match="Executor worker") as caught:
            engine.LLM(model=converted, skip_tokenizer_init=True, checkpoint_loader=TellingLoader())
        told = str(caught.value.__cause__)
        assert "['TRTLLM_CT_SEEN']" in told
        assert f"process {os.getpid()}" not in told

        class Local:
            pass

        with pytest.raises((AttributeError, TypeError), match="Local"):
            engine.LLM(model=converted, skip_tokenizer_init=True, checkpoint_loader=Local())


@pytest.mark.reference
def test_spawned_ranks_generate_the_same_text(converted: Path) -> None:
    results = []
    for in_process in (True, False):
        with (
            engine_double.installed("newest", in_process=in_process) as engine,
            engine.LLM(model=converted, tensor_parallel_size=2) as llm,
        ):
            result = llm.generate("The import statement", engine.SamplingParams(max_tokens=6))
            results.append((result.prompt, result.outputs[0].token_ids, result.outputs[0].finish_reason))
    assert results[0] == results[1]
    assert (len(results[0][1]), results[0][2]) == (6, "length")
