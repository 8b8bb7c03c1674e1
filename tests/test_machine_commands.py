"""`doctor`, `cache` and the parallel sizes of `inspect` and `plan`, through the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
from builders import rewrite_config, tiny_config, write_checkpoint
from command_line import run_cli

import trtllm_ct
from trtllm_ct.targets.trtllm_torch.features import EngineParts, probe_features

if TYPE_CHECKING:
    from collections.abc import Iterator

BINDINGS = ("trtllm_ct.targets.trtllm_torch.bindings",)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRTLLM_CT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=engine_double.GENERATIONS)
def generation(request: pytest.FixtureRequest) -> Iterator[str]:
    with engine_double.installed(request.param, importers=BINDINGS):
        yield request.param


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Int4 in groups of 64, with 128 columns: two ranks have whole groups, four have not."""
    config = tiny_config(hidden=128, heads=4, kv_heads=4, intermediate=256)
    return write_checkpoint(tmp_path / "made", config=config, scheme="int4-g64").directory


class TestDoctor:
    def test_without_the_engine_the_reference_engine_runs(self) -> None:
        done = run_cli("doctor", "--json")

        assert done.code == 0
        assert (done.document["engine"], done.document["features"]) == ("reference", None)
        (fault,) = [fault for fault in done.document["missing"] if fault["where"] == "tensorrt_llm"]
        assert "pip install" in fault["remedy"]

    def test_with_it_features_give_the_capability_set(self, generation: str) -> None:
        done = run_cli("doctor", "--json")

        document = done.document
        assert document["engine"] == "tensorrt_llm"
        assert document["capabilities"]["name"] == {"old": "stock-1.0", "newest": "stock-1.3"}[generation]
        assert document["features"]["force_dynamic_quantization"] == (generation == "newest")
        assert document["features"]["mapping_argument"] == (generation == "newest")
        assert document["features"]["additive_zeros"] is True

    def test_the_switch_for_patches_is_seen(self, generation: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRTLLM_CT_NO_PATCH", "1")

        done = run_cli("doctor", "--json")

        assert done.document["features"]["additive_zeros"] is False
        assert "TRTLLM_CT_NO_PATCH" in " ".join(fault["remedy"] for fault in done.document["missing"])

    def test_what_it_makes_of_a_directory(self, generation: str, made: Path) -> None:
        document = run_cli("doctor", made, "--tp", "4", "--json").document["served"]

        assert document["parallel"]["tensor"] == 4
        assert sum(document["native"].values()) + sum(map(len, document["dequantized"].values())) == 14
        assert document["problems"] == []
        text = run_cli("doctor", made, "--tp", "2").out
        assert "served natively: 14 x W4A16_AWQ g64" in text
        assert "TensorRT-LLM" in text

    def test_a_directory_that_cannot_be_served_is_exit_code_1(self, made: Path) -> None:
        (made / "model.safetensors").write_bytes(b"")

        done = run_cli("doctor", made)

        assert done.code == 1
        assert "Problems (1)" in done.out

    def test_another_checkpoint_goes_to_the_engine(self, tmp_path: Path) -> None:
        directory = write_checkpoint(tmp_path / "plain", scheme="dense").directory
        rewrite_config(directory, lambda config: config.pop("quantization_config"))

        done = run_cli("doctor", directory)

        assert done.code == 0
        assert "it goes to the engine untouched" in done.out


class TestFeatures:
    """Release numbers decide nothing."""

    @staticmethod
    def parts(algos: set[str], *, mapping: bool = True, version: str | None = None) -> Any:
        class Linear:
            QuantAlgo = type("QuantAlgo", (), {"__members__": dict.fromkeys(algos), "W4A16_GPTQ": "W4A16_GPTQ"})
            QuantConfig = dict

            @staticmethod
            def get_quant_method(config: dict[str, Any]) -> Any:
                raise ValueError(config["quant_algo"])

        def with_mapping(self: Any, checkpoint_dir: str, mapping: Any) -> None: ...
        def without(self: Any, checkpoint_dir: str) -> None: ...

        loader = type("Loader", (), {"load_weights": with_mapping if mapping else without})
        return EngineParts(
            linear=Linear, llm_args=type("Args", (), {}), llm_utils=object(), weight_loader=loader, version=version
        )

    def test_members_and_signatures_decide(self) -> None:
        from trtllm_ct.targets import ENGINES

        newest = set().union(*(each.linear | each.experts for each in ENGINES.values()))
        found = probe_features(self.parts({str(algo) for algo in newest}, version="0.1"))
        assert found.engine == list(ENGINES)[-1]
        oldest = probe_features(self.parts({str(algo) for algo in newest}, mapping=False, version="99.0"))
        assert oldest.engine == next(iter(ENGINES))
        assert oldest.mapping_argument is False

    def test_an_engine_without_the_common_algorithms_is_refused(self) -> None:
        from trtllm_ct.errors import UsageError

        with pytest.raises(UsageError, match=r"TensorRT-LLM 1\.0 or newer"):
            probe_features(self.parts({"FP8"}))


class TestCache:
    def test_what_was_prepared_is_listed_and_kept_while_it_is_used(self, made: Path, cache: Path) -> None:
        directory = trtllm_ct.prepare(made, tensor_parallel_size=2)

        document = run_cli("cache", "list", "--json").document
        text = run_cli("cache", "list").out
        cleared = run_cli("cache", "clear", "--json").document

        assert document["root"] == str(cache)
        assert len(document["sidecars"]) == 1
        assert directory.name in text
        assert str(made) in text
        assert (cleared["removed"], cleared["in_use"]) == ([], [str(directory)])
        assert directory.is_dir()

    def test_what_nobody_uses_is_deleted(self, made: Path, cache: Path) -> None:
        import subprocess
        import sys

        program = f"import trtllm_ct; print(trtllm_ct.prepare({str(made)!r}))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        directory = Path(done.stdout.split()[-1])

        assert "Removed 1 from" in run_cli("cache", "clear").out
        assert not directory.exists()

    def test_an_empty_cache(self, cache: Path) -> None:
        assert run_cli("cache", "list").out.startswith(f"0 in {cache}")
        assert run_cli("cache", "clear").code == 0

    def test_a_damaged_one_is_named(self, made: Path, cache: Path) -> None:
        directory = trtllm_ct.prepare(made)
        (directory / "trtllm_ct.json").write_text("{}")

        assert directory.name in run_cli("cache", "list").out


class TestParallelSizes:
    def test_a_module_whose_slices_do_not_fit_is_dequantized_and_says_which_sizes_work(self, made: Path) -> None:
        document = run_cli("inspect", made, "--tp", "4", "--to", "tensorrt_llm", "--json").document

        reasons = {module["name"]: module.get("reason", "") for module in document["modules"]}
        assert (
            "W4A16_AWQ at tensor parallel 4: each rank's 32 columns are no multiple of 64; sizes 1, 2 work"
            in (reasons["model.layers.0.self_attn.o_proj"])
        )

    def test_strict_refuses_it_with_the_same_words(self, made: Path) -> None:
        done = run_cli("plan", made, "--to", "tensorrt_llm", "--tp", "4", "--strict")

        assert done.code == 1
        assert "model.layers.{0..1}.self_attn.o_proj" in done.err_words
        assert "sizes 1, 2 work" in done.err_words
        assert run_cli("plan", made, "--to", "tensorrt_llm", "--tp", "2", "--strict").code == 0

    def test_heads_that_ranks_cannot_share_are_a_problem(self, made: Path) -> None:
        done = run_cli("inspect", made, "--tp", "3")

        assert done.code == 1
        assert "num_attention_heads" in done.out
        assert "Tensor-parallel sizes that work: 1, 2, 4" in " ".join(done.out.split())

    @pytest.mark.parametrize("sizes", [("--tp", "0"), ("--tp", "2", "--ep", "4"), ("--pp", "-1")], ids=" ".join)
    def test_sizes_that_mean_nothing_are_usage(self, made: Path, sizes: tuple[str, ...]) -> None:
        assert run_cli("inspect", made, *sizes).code == 2

    def test_more_stages_than_layers(self, made: Path) -> None:
        done = run_cli("plan", made, "--to", "modelopt", "--pp", "3")

        assert done.code == 1
        assert "at most 2" in done.err_words
