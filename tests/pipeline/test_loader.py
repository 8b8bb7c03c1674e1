"""CompressedTensorsWeightLoader: layouts, decompressors, log messages and memory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import SCHEMES, Built, config_group, int_weights, quantization_block, tiny_config, write_checkpoint
from fresh_python import run_python
from on_tensors import on_tensors
from safetensors.torch import save_file
from stated_model import stated_model
from torch import Tensor

from trtllm_ct.base.errors import PayloadError, PlanError, UsageError
from trtllm_ct.layouts import rounding as rounding_layout
from trtllm_ct.pipeline import loader as loader_module
from trtllm_ct.pipeline.loader import CompressedTensorsWeightLoader
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

round_once = on_tensors(rounding_layout.round_once)

MIXED = {
    "q_proj": "int4-g64",
    "k_proj": "int4-g64",
    "v_proj": "int4-g64",
    "o_proj": "int8-g32",
    "down_proj": "int8-channel",
}
NOT_FOUND = (
    "compressed-tensors library not found. Will attempt to load weights as standard safetensors.",
    "Install with: pip install compressed-tensors",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Native, dequantized and plain modules, biases and KV scales, in two shards."""
    config = tiny_config("Qwen2ForCausalLM")
    return write_checkpoint(tmp_path_factory.mktemp("mixed"), config=config, scheme=MIXED, kv=True, shards=2)


def load(directory: Path, **options: Any) -> dict[str, Tensor]:
    return CompressedTensorsWeightLoader().load_weights(directory, **options)


def exact(built: Built, names: Iterable[str]) -> dict[str, Tensor]:
    """The true weights, rounded once to bfloat16."""
    return {name: round_once(built.dense[name], torch.bfloat16) for name in names}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Same names in the same order, same dtypes, same bits."""
    assert list(got) == list(want)
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), want[name].reshape(-1).view(torch.uint8)), name


class TestLayouts:
    def test_native_is_what_a_modelopt_directory_holds(self, built: Built):
        weights = load(built.directory)

        specs = plan_checkpoint(built.directory).delivered_specs
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()} == {
            name: (spec.dtype.torch_dtype, spec.shape) for name, spec in specs.items()
        }

    def test_dense_is_the_exact_weight_rounded_once(self, built: Built):
        weights = load(built.directory, layout="dense")

        assert_equal(weights, exact(built, weights))
        assert weights.keys() == built.dense.keys()

    def test_stored_returns_the_tensors_of_the_files(self, built: Built):
        weights = load(built.directory, layout="stored")

        assert weights.keys() == built.stored.keys()
        assert_equal(weights, {name: built.stored[name] for name in weights})

    @pytest.mark.parametrize("layout", ["native", "dense", "stored"])
    def test_every_tensor_is_contiguous(self, built: Built, layout: str):
        assert all(tensor.is_contiguous() for tensor in load(built.directory, layout=layout).values())

    @pytest.mark.parametrize("layout", ["native", "dense", "stored"])
    def test_streaming_yields_the_same_weights_module_by_module(self, built: Built, layout: str):
        streamed = list(CompressedTensorsWeightLoader().stream(built.directory, layout=layout))

        assert len({module for module, _ in streamed}) == len(streamed)
        assert all(name.startswith(f"{module}.") for module, tensors in streamed for name in tensors)
        assert_equal(
            {name: tensor for _, tensors in streamed for name, tensor in tensors.items()},
            load(built.directory, layout=layout),
        )

    def test_weights_outlive_the_stream_that_they_came_from(self, tmp_path: Path):
        """A view of a memory-mapped file must stay valid after the reader is closed."""
        built = write_checkpoint(tmp_path, scheme="int8-plain-channel")
        name = "model.layers.1.mlp.down_proj.weight"

        assert torch.equal(load(tmp_path)[name], built.stored[name])


class TestArguments:
    def test_the_arguments_of_engines_change_nothing(self, built: Built):
        """Each rank gets tensors of full size; releases pass a mapping and further keywords."""
        weights = CompressedTensorsWeightLoader().load_weights(str(built.directory), object(), use_consolidated=True)

        assert_equal(weights, load(built.directory))

    @pytest.mark.parametrize("options", [{"layout": "engine"}, {"layout": "NATIVE"}])
    def test_an_unknown_layout_names_the_known_ones(self, tmp_path: Path, options: dict[str, str]):
        with pytest.raises(UsageError) as caught:
            load(tmp_path, **options)

        assert caught.value.faults[0].where == "layout"
        assert caught.value.faults[0].expected == "stored or native or dense"

    def test_an_unknown_decompressor_is_refused_before_anything_is_read(self):
        with pytest.raises(UsageError) as caught:
            CompressedTensorsWeightLoader(decompressor="cuda")

        assert set(caught.value.faults[0].expected.split(" or ")) == {"auto", "library", "native"}

    def test_faults_come_before_the_first_module(self, tmp_path: Path):
        write_checkpoint(tmp_path, edit=lambda stored: stored.pop("model.norm.weight"))

        with pytest.raises(PlanError, match=r"model\.norm\.weight"):
            CompressedTensorsWeightLoader().stream(tmp_path)

    def test_a_bad_scale_stops_the_stream_at_its_module(self, tmp_path: Path):
        name = "model.layers.0.self_attn.k_proj.weight_scale"
        write_checkpoint(tmp_path, edit=lambda stored: stored[name].fill_(float("nan")))
        seen = []

        with pytest.raises(PayloadError, match="k_proj"):
            seen.extend(CompressedTensorsWeightLoader().stream(tmp_path))

        assert load(tmp_path, layout="stored")[name].isnan().all()


class TestDecompressors:
    def test_native_and_auto_are_the_same_for_formats_of_this_package(self, built: Built):
        for layout in ("native", "dense"):
            native = CompressedTensorsWeightLoader(decompressor="native").load_weights(built.directory, layout=layout)
            assert_equal(load(built.directory, layout=layout), native)

    @pytest.mark.library
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_the_library_agrees_with_this_package(self, tmp_path: Path, scheme: str):
        """Equal codes, scales and zero points; equal plain values after one rounding to its dtype, the scale's."""
        config = tiny_config(intermediate=256, layers=1)
        built = write_checkpoint(tmp_path, config=config, scheme={"down_proj": scheme})
        weights = {
            (decompressor, layout): CompressedTensorsWeightLoader(decompressor=decompressor).load_weights(
                tmp_path, layout=layout
            )
            for decompressor in ("native", "library")
            for layout in ("native", "dense")
        }

        assert_equal(weights["library", "native"], weights["native", "native"])
        assert_equal(weights["library", "dense"], weights["native", "dense"])
        assert_equal(weights["library", "dense"], exact(built, weights["library", "dense"]))


class TestMissingLibrary:
    @pytest.fixture
    def built(self, tmp_path: Path) -> Built:
        """Without biases: plans for unknown GPUs warn about them."""
        return write_checkpoint(tmp_path / "source", scheme=MIXED, kv=True, shards=2)

    @pytest.fixture
    def without_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The package is searched for but not imported, so hiding it from the search is enough."""
        found = importlib.util.find_spec
        hidden = "compressed_tensors"
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: None if name == hidden else found(name, *more)
        )
        loader_module._log_missing_library.cache_clear()

    def test_it_is_logged_once_and_loading_continues(
        self, built: Built, without_library: None, caplog: pytest.LogCaptureFixture
    ):
        native = CompressedTensorsWeightLoader(decompressor="native").load_weights(built.directory)

        with caplog.at_level(logging.INFO):
            for _ in range(2):
                weights = CompressedTensorsWeightLoader(decompressor="library").load_weights(built.directory)

        assert_equal(weights, native)
        assert tuple(record.getMessage() for record in caplog.records) == NOT_FOUND
        assert {record.name for record in caplog.records} == {"trtllm_ct"}

    def test_a_release_that_is_too_old_is_logged_once_and_loading_continues(
        self, built: Built, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        native = CompressedTensorsWeightLoader(decompressor="native").load_weights(built.directory)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
        monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.8.1")
        loader_module._log_outdated_library.cache_clear()

        with caplog.at_level(logging.INFO):
            for _ in range(2):
                weights = CompressedTensorsWeightLoader(decompressor="library").load_weights(built.directory)

        assert_equal(weights, native)
        (record,) = caplog.records
        assert "compressed-tensors 0.8.1 is installed" in record.getMessage()
        assert "pip install 'trtllm-ct[compressed-tensors]'" in record.getMessage()

    @pytest.mark.parametrize("options", [{}, {"decompressor": "native"}, {"layout": "stored"}])
    def test_nothing_is_logged_if_the_library_is_not_requested(
        self, built: Built, without_library: None, caplog: pytest.LogCaptureFixture, options: dict[str, str]
    ):
        decompressor = options.get("decompressor", "auto")
        CompressedTensorsWeightLoader(decompressor=decompressor).load_weights(
            built.directory, layout=options.get("layout", "native")
        )

        assert not caplog.records

    def test_the_main_path_works_where_the_library_cannot_be_imported(self, built: Built, tmp_path: Path):
        """Inspect, load, convert and verify in a new process where it is neither installed nor importable."""
        done = run_python(
            """
            import importlib.util, sys
            from importlib.abc import MetaPathFinder

            class Hide(MetaPathFinder):
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] == "compressed_tensors":
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

            found = importlib.util.find_spec
            importlib.util.find_spec = lambda name, *rest: None if name == "compressed_tensors" else found(name, *rest)
            sys.meta_path.insert(0, Hide())
            source, out = sys.argv[1:]
            import trtllm_ct

            assert not trtllm_ct.inspect_checkpoint(source).problems
            for layout in ("native", "dense", "stored"):
                assert trtllm_ct.CompressedTensorsWeightLoader().load_weights(source, layout=layout)
            trtllm_ct.convert_checkpoint(source, out)
            assert trtllm_ct.verify_checkpoint(source, out).good
            print("compressed_tensors" in sys.modules)
            """,
            built.directory,
            tmp_path / "out",
        )

        assert done.stdout == "False\n"
        assert done.stderr == ""


class TestMemory:
    """Measured in a new process, as anonymous memory: pages of memory-mapped files can be dropped at any time."""

    @pytest.fixture
    def large(self, tmp_path: Path) -> Path:
        """76 MB of int8 codes; the largest module has 4 MB of them, 8 MB when dequantized."""
        config = tiny_config(hidden=1024, heads=8, kv_heads=1, intermediate=4096, layers=5, vocabulary=32)
        group = config_group(int_weights(8, "channel"), format="int-quantized")
        config["quantization_config"] = quantization_block({"group_0": group}, format="int-quantized")
        stored: dict[str, Tensor] = {}
        for site in stated_model(config).sites():
            quantized = site.class_name == "Linear" and site.module != "lm_head"
            stored[f"{site.module}.weight"] = torch.ones(site.shape, dtype=torch.int8 if quantized else torch.bfloat16)
            if quantized:
                stored[f"{site.module}.weight_scale"] = torch.ones(site.shape[0], 1, dtype=torch.bfloat16)
        save_file(stored, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    def test_it_takes_about_one_module_in_addition_to_the_result(self, large: Path):
        """The module's plain weight and the tiles in which it is computed, while 152 MB pass through."""
        done = run_python(
            """
            import re, sys, threading

            from trtllm_ct import CompressedTensorsWeightLoader

            def anonymous():
                with open("/proc/self/status") as status:
                    return int(re.search(r"RssAnon:\\s+(\\d+) kB", status.read())[1]) / 1024

            def watch():
                global peak
                while not stop.wait(0.001):
                    peak = max(peak, anonymous())

            loader = CompressedTensorsWeightLoader(decompressor="native")
            streamed = loader.stream(sys.argv[1], layout="dense")
            # Imports, those of compiled loops too, are not what is measured.
            next(module for module, _ in streamed if module.endswith("q_proj"))
            peak = before = anonymous()
            stop = threading.Event()
            threading.Thread(target=watch).start()
            for _ in streamed:
                pass
            print(peak - before)
            peak = before = anonymous()
            weights = loader.load_weights(sys.argv[1], layout="dense")
            result = sum(tensor.nbytes for tensor in weights.values()) / 2**20
            stop.set()
            print(peak - before - result, result)
            """,
            large,
        )

        streaming, loading, result = (float(number) for number in done.stdout.split())
        assert result > 140
        assert streaming < 64
        assert loading < 64
