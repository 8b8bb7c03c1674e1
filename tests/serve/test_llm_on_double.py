"""`trtllm_ct.LLM` on the double of all generations: the arguments that the engine gets, and its output."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
from builders import Built, rewrite, rewrite_config, tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from hub_cache import COMMIT, HubCache
from plain_model import deviation, plain_logits

import trtllm_ct
from trtllm_ct import LLM, convert_checkpoint
from trtllm_ct.base.errors import CheckpointError, PlanError, UsageError
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.serve.sidecar import Sidecar, is_sidecar

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
DEMO = Path(trtllm_ct.__file__).parent / "cli" / "demo_data"
TOKENS = list(range(5, 25))
EXACT, DEQUANTIZED = 2e-3, 2e-2
ROW_WISE = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "fp8-channel-token")
STATIC_MLP = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "fp8-tensor-static")

pytestmark = pytest.mark.usefixtures("sidecar_cache")


@pytest.fixture
def made(tmp_path: Path) -> Built:
    return write_checkpoint(tmp_path / "made", config=tiny_config(hidden=128), scheme="int4-g64")


def served(model: str | Path, **arguments: Any) -> Any:
    return LLM(model, **{"skip_tokenizer_init": True, **arguments})


def opened(llm: Any) -> Sidecar:
    """Return the sidecar that the engine was given."""
    return Sidecar.open(llm.args.model)


@pytest.mark.reference
def test_text_is_that_of_the_reference_engine(engine: Any) -> None:
    params = trtllm_ct.SamplingParams(max_tokens=12)

    llm = LLM(model=DEMO, tensor_parallel_size=2)

    assert type(llm) is engine.LLM
    assert type(params) is engine.SamplingParams
    ours = LLM(DEMO, engine="reference").generate(["The import statement"], params)
    for got, want in zip(llm.generate(["The import statement"], params), ours, strict=True):
        assert (got.prompt, got.prompt_token_ids) == (want.prompt, want.prompt_token_ids)
        for field in ("text", "token_ids", "finish_reason"):
            assert getattr(got.outputs[0], field) == getattr(want.outputs[0], field)


@pytest.mark.parametrize(
    ("generation", "error"),
    [
        ("old", (NotImplementedError, "Unsupported quantization_config")),
        ("mid", (NotImplementedError, "Unsupported quantization_config")),
        ("newest", (TypeError, "not subscriptable")),
    ],
)
def test_stock_fails_on_what_this_package_loads(generation: str, error: tuple[type[Exception], str]) -> None:
    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        with pytest.raises(error[0], match=error[1]):
            engine.LLM(model=DEMO, skip_tokenizer_init=True)

        assert served(DEMO).logits(TOKENS).isfinite().all()


@pytest.mark.reference
@pytest.mark.parametrize("scheme", ["int4-g64", "fp8-channel-token", "w8a8"])
def test_logits_are_those_of_the_exact_weights(engine: Any, tmp_path: Path, scheme: str) -> None:
    built = write_checkpoint(tmp_path / "made", config=tiny_config(hidden=128), scheme=scheme)

    assert deviation(served(built.directory).logits(TOKENS), plain_logits(built.config, built.dense, TOKENS)) < EXACT


def test_the_log_says_which_engine_runs_and_why(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trtllm_ct")

    served(DEMO)

    assert f"TensorRT-LLM {engine.__version__} runs {DEMO}: it is installed" in caplog.messages


def test_all_keywords_are_passed_on(engine: Any) -> None:
    cache_config = engine.KvCacheConfig(free_gpu_memory_fraction=0.5)

    llm = served(DEMO, backend="pytorch", max_seq_len=77, kv_cache_config=cache_config, disable_overlap_scheduler=True)

    args = llm.args
    assert (args.backend, args.max_seq_len, args.disable_overlap_scheduler) == ("pytorch", 77, True)
    assert args.kv_cache_config is cache_config
    with pytest.raises(ValueError, match="no_such_argument"):
        served(DEMO, no_such_argument=1)


@pytest.mark.parametrize(
    ("arguments", "parallel"),
    [
        ({}, Parallel()),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, Parallel(tensor=2, pipeline=2)),
        ({"tensor_parallel_size": 4, "moe_expert_parallel_size": 2}, Parallel(tensor=4, expert=2)),
        ({"tensor_parallel_size": 4, "moe_tensor_parallel_size": 1}, Parallel(tensor=4, expert=4)),
        ({"tensor_parallel_size": 2, "moe_expert_parallel_size": -1}, Parallel(tensor=2)),
    ],
    ids=str,
)
def test_the_plan_knows_the_sizes(engine: Any, tmp_path: Path, arguments: dict[str, Any], parallel: Parallel) -> None:
    config = tiny_config("MixtralForCausalLM", hidden=128, kv_heads=4)
    built = write_checkpoint(tmp_path / "made", config=config, scheme="fp8-tensor-static")

    assert opened(served(built.directory, **arguments)).options.parallel == parallel


def test_inconsistent_expert_sizes_raise(newest: Any) -> None:
    with pytest.raises(UsageError, match=r"moe_tensor_parallel_size.*2 and 4"):
        served(DEMO, tensor_parallel_size=4, moe_expert_parallel_size=2, moe_tensor_parallel_size=4)


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "bfloat16"), ("float16", "float16")])
def test_the_plan_knows_the_dtype(engine: Any, made: Built, dtype: str, stored: str) -> None:
    assert opened(served(made.directory, dtype=dtype)).plan.dense_dtype.torch_name == stored


def test_an_invalid_dtype_raises(newest: Any) -> None:
    with pytest.raises(UsageError, match=r"dtype: .*'fp16'"):
        served(DEMO, dtype="fp16")


# Models that are left to the engine.


@pytest.mark.parametrize("kind", ["modelopt", "dense"])
def test_other_checkpoints_go_to_the_engine_unchanged(
    engine: Any, tmp_path: Path, kind: Any, sidecar_cache: Path
) -> None:
    convert_checkpoint(DEMO, tmp_path / "out", to=kind)

    llm = served(str(tmp_path / "out"), tensor_parallel_size=2)

    assert (llm.args.model, llm.args.checkpoint_loader) == (str(tmp_path / "out"), None)
    assert llm.args.checkpoint_format == "HF"
    assert not sidecar_cache.exists()


def test_other_directories_are_left_to_the_engine(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"config\.json"):
        served(tmp_path)


def test_a_broken_checkpoint_raises_before_the_engine_starts(engine: Any, made: Built) -> None:
    rewrite(made.directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale"))

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight_scale"):
        served(made.directory)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"backend": "_autodeploy"}, "backend='_autodeploy'"),
        ({"backend": "tensorrt"}, "backend='tensorrt'"),
        ({"checkpoint_format": "HF"}, "checkpoint_format='HF'"),
        ({"checkpoint_loader": object()}, "checkpoint_loader"),
    ],
    ids=["autodeploy", "tensorrt backend", "checkpoint format", "checkpoint loader"],
)
def test_arguments_that_drop_the_loader_raise(engine: Any, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        served(DEMO, **arguments)

    assert [fault.where for fault in caught.value.faults] == [named]


def test_all_conflicting_arguments_are_named_together(newest: Any) -> None:
    with pytest.raises(UsageError) as caught:
        served(DEMO, backend="_autodeploy", checkpoint_format="mistral", checkpoint_loader=3)

    assert len(caught.value.faults) == 3


def test_other_models_may_have_a_format_and_a_loader(engine: Any, tmp_path: Path) -> None:
    convert_checkpoint(DEMO, tmp_path / "out")

    assert served(tmp_path / "out", checkpoint_format="HF").args.checkpoint_format == "HF"


# Loaders and prepared directories that the user passes.


def test_this_packages_loader_may_be_passed(engine: Any) -> None:
    loader = trtllm_ct.CompressedTensorsCheckpointLoader()

    llm = served(DEMO, checkpoint_loader=loader)

    assert llm.args.checkpoint_loader is loader
    assert loader.report.modes == {"W4A16_AWQ g128": 28}


def test_the_engines_loader_with_this_packages_weight_loader_may_be_passed(engine: Any) -> None:
    """TensorRT-LLM's documentation shows this way."""
    from tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader import HfCheckpointLoader

    from trtllm_ct.serve.bindings import CompressedTensorsConfigLoader, CompressedTensorsWeightLoader

    loader = HfCheckpointLoader(
        weight_loader=CompressedTensorsWeightLoader(), config_loader=CompressedTensorsConfigLoader()
    )

    assert served(DEMO, checkpoint_loader=loader).logits(TOKENS).isfinite().all()


def test_a_prepared_directory_is_used_unchanged(engine: Any) -> None:
    prepared = trtllm_ct.prepare(DEMO, tensor_parallel_size=2, dense_o_proj=True)

    llm = served(prepared, tensor_parallel_size=2)

    assert Path(llm.args.model) == prepared


def test_a_directory_that_was_prepared_for_other_sizes_is_prepared_again(engine: Any) -> None:
    prepared = trtllm_ct.prepare(DEMO, strict=True)

    llm = served(prepared, tensor_parallel_size=2)

    assert Path(llm.args.model) != prepared
    assert opened(llm).options.parallel == Parallel(tensor=2)
    assert opened(llm).options.strict


# Hugging Face repositories.


def test_a_repository_is_served_at_its_commit(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = HubCache(tmp_path / "hub", monkeypatch).add("org/demo", DEMO)

    llm = served("org/demo")

    sidecar = opened(llm)
    assert sidecar.source == snapshot
    assert (sidecar.repository.name, sidecar.repository.revision) == ("org/demo", COMMIT)
    assert llm.logits(TOKENS).isfinite().all()


def test_a_revision_is_honoured(newest: Any, tmp_path: Path, made: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = HubCache(tmp_path / "hub", monkeypatch)
    hub.add("org/demo", DEMO)
    second = hub.add("org/demo", made.directory, commit="f" * 40, branch="v2")

    assert opened(served("org/demo", revision="v2")).source == second


def test_another_repository_is_left_to_the_engine(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_checkpoint(DEMO, tmp_path / "out")
    HubCache(tmp_path / "hub", monkeypatch).add("org/modelopt", tmp_path / "out")

    assert served("org/modelopt").args.model == "org/modelopt"


ON_ANOTHER_NODE = """
import pickle, sys
import engine_double
from engine_fixtures import BINDINGS
with engine_double.installed(sys.argv[1], importers=["trtllm_ct.serve.bindings"]):
    loader = pickle.loads(open(sys.argv[2], "rb").read())
    loader.load_config(sys.argv[3], trust_remote_code=True)
    weights = loader.load_weights(sys.argv[3], **({} if sys.argv[1] == "old" else {"mapping": None}))
    print(len(weights), loader.report.source)
"""


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_a_node_with_another_cache_downloads_the_repository(
    generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the sidecar nor the path of the snapshot exists on that node, and `main` has moved."""
    hub = HubCache(tmp_path / "hub", monkeypatch)
    hub.add("org/demo", DEMO)
    with engine_double.installed(generation, importers=[BINDINGS]):
        llm = served("org/demo")
        state, model = pickle.dumps(llm.args.checkpoint_loader), llm.args.model
    (tmp_path / "loader.pickle").write_bytes(state)
    (tmp_path / "hub").rename(tmp_path / "other-hub")
    (tmp_path / "cache").rename(tmp_path / "lost")
    (tmp_path / "other-hub" / "models--org--demo" / "refs" / "main").write_text("f" * 40)
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "other-hub"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]),
    }

    done = subprocess.run(
        [sys.executable, "-c", ON_ANOTHER_NODE, generation, str(tmp_path / "loader.pickle"), model],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].startswith(str(tmp_path / "other-hub"))
    assert is_sidecar(model)


# Draft models.


def test_a_compressed_tensors_draft_is_prepared_too(engine: Any, tmp_path: Path, made: Built) -> None:
    from tensorrt_llm.llmapi import DraftTargetDecodingConfig

    draft = write_checkpoint(tmp_path / "draft", config=tiny_config(hidden=128, layers=1), scheme="int8-channel")
    config = DraftTargetDecodingConfig(speculative_model_dir=str(draft.directory))

    llm = served(made.directory, speculative_config=config, tensor_parallel_size=2)

    assert config.speculative_model_dir == str(draft.directory)
    sidecar = Sidecar.open(llm.args.speculative_config.speculative_model_dir)
    assert sidecar.source == draft.directory
    assert sidecar.options == opened(llm).options
    assert llm.logits(TOKENS, draft=True).isfinite().all()


@pytest.mark.parametrize("kind", ["plain draft", "plain model"])
def test_model_or_draft_may_be_plain(engine: Any, tmp_path: Path, made: Built, kind: str) -> None:
    from tensorrt_llm.llmapi import DraftTargetDecodingConfig

    convert_checkpoint(made.directory, tmp_path / "plain", to="dense")
    directories = [made.directory, tmp_path / "plain"]
    model, draft = directories if kind == "plain draft" else reversed(directories)

    llm = served(model, speculative_config=DraftTargetDecodingConfig(speculative_model_dir=str(draft)))

    speculative = llm.args.speculative_config.speculative_model_dir
    assert (is_sidecar(llm.args.model), is_sidecar(speculative)) == (kind == "plain draft", kind == "plain model")
    same = llm.logits(TOKENS) - llm.logits(TOKENS, draft=True)
    assert same.abs().max() < DEQUANTIZED * llm.logits(TOKENS).std()


# Attention quantizes its output at a fixed scale if the KV cache is quantized and o_proj has no input scale.


@pytest.fixture
def row_wise(tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint with row-wise FP8 attention and an FP8 KV cache.

    Its values reach o_proj a thousand times smaller than usual.
    """

    def write(schemes: dict[str, str] | None = None, *, kv: bool = True) -> Path:
        def shrink(tensors: dict[str, Any]) -> None:
            for name, tensor in tensors.items():
                if name.endswith("v_proj.weight_scale"):
                    tensor.mul_(2**-10)
                if name.endswith("o_proj.weight_scale"):
                    tensor.mul_(2**10)

        built = write_checkpoint(tmp_path / "row-wise", scheme={**ROW_WISE, **(schemes or {})}, kv=kv, edit=shrink)
        return built.directory

    return write


def warned(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("scheme", ["fp8-channel-token", "fp8-block"])
def test_new_releases_get_force_dynamic_quantization(newest: Any, tmp_path: Path, scheme: str, caplog: Any) -> None:
    write_checkpoint(tmp_path / "made", config=tiny_config(hidden=256, heads=4), scheme=scheme, kv=True)

    assert served(tmp_path / "made").args.force_dynamic_quantization is True
    assert not [line for line in warned(caplog) if "quantizes the weights again" not in line]


def test_old_releases_cause_a_warning(old: Any, row_wise: Any, caplog: Any) -> None:
    llm = served(row_wise())

    assert llm.args.force_dynamic_quantization is False
    assert any("2 o_proj behind a quantized KV cache" in line for line in warned(caplog))
    assert any("dense_o_proj=True" in line for line in warned(caplog))


@pytest.mark.parametrize("wish", [None, True])
def test_an_argument_that_attention_ignores_is_no_remedy(
    newest: Any, row_wise: Any, wish: bool | None, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In releases of early 2026, Linears honour the argument and attention does not."""
    attention = import_module("tensorrt_llm._torch.modules.attention").Attention
    monkeypatch.setattr(attention, "_use_quantize_output", lambda self: self.has_quant_scale)

    llm = served(row_wise(), **({} if wish is None else {"force_dynamic_quantization": wish}))

    assert llm.args.force_dynamic_quantization is bool(wish)
    assert any("no force_dynamic_quantization that attention honours" in line for line in warned(caplog))


@pytest.mark.parametrize("directory", ["source", "converted"])
def test_a_user_who_forbids_dynamic_quantization_is_told(
    newest: Any, row_wise: Any, tmp_path: Path, directory: str, caplog: Any
) -> None:
    """The argument stays as it is, and attention then quantizes at a fixed scale."""
    model = row_wise()
    if directory == "converted":
        convert_checkpoint(model, tmp_path / "out", engine="stock-1.3")
        model = tmp_path / "out"

    llm = served(model, force_dynamic_quantization=False)

    assert llm.args.force_dynamic_quantization is False
    (line,) = [line for line in warned(caplog) if "fixed scale" in line]
    assert "2 o_proj behind a quantized KV cache" in line
    if directory == "source":
        assert "Leave force_dynamic_quantization out" in line


@pytest.mark.parametrize("scheme", [None, "fp8-block", "fp8-tensor-static", "int4-g64"])
def test_nothing_happens_with_a_16_bit_cache(engine: Any, tmp_path: Path, scheme: str | None, caplog: Any) -> None:
    write_checkpoint(tmp_path / "made", config=tiny_config(hidden=256, heads=4), scheme=scheme or ROW_WISE)

    llm = served(tmp_path / "made", dense_o_proj=True)

    assert not llm.args.force_dynamic_quantization
    assert not [module.name for module in opened(llm).plan.modules if module.dequantized]
    assert not [line for line in warned(caplog) if "quantizes the weights again" not in line]


@pytest.mark.parametrize("schemes", [{"o_proj": "int4-g64"}, {"q_proj": "int4-g64", "k_proj": "int4-g64"}])
def test_nothing_happens_if_only_a_part_of_attention_takes_quantized_values(
    old: Any, tmp_path: Path, schemes: dict[str, str], caplog: Any
) -> None:
    """Attention writes FP8 values if its own mode, that of q_proj, and the mode of o_proj have scales for them."""
    schemes = {**ROW_WISE, **schemes, **({"v_proj": "int4-g64"} if "q_proj" in schemes else {})}
    write_checkpoint(tmp_path / "made", config=tiny_config(hidden=128), scheme=schemes, kv=True)

    served(tmp_path / "made")

    assert not warned(caplog)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tensor_parallel_size", {"tensor_parallel_size": "two"}),
        ("pipeline_parallel_size", {"pipeline_parallel_size": [2]}),
        ("moe_expert_parallel_size", {"moe_expert_parallel_size": "all"}),
        ("kv_cache_config.dtype", {"kv_cache_config": {"dtype": "int3"}}),
        ("requantize", {"requantize": 3}),
        ("calibration", {"requantize": "all=w4a8-awq", "calibration": 3}),
        ("strict", {"strict": "no"}),
        ("dense_o_proj", {"dense_o_proj": "yes"}),
    ],
)
def test_a_wrong_argument_is_refused_by_name(newest: Any, row_wise: Any, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{name}: expected"):
        served(row_wise(kv=False), **arguments)


@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
def test_the_cache_that_the_user_asks_for_counts(newest: Any, row_wise: Any, dtype: str) -> None:
    cache = import_module("tensorrt_llm.llmapi").KvCacheConfig(dtype=dtype)

    assert served(row_wise(kv=False), kv_cache_config=cache).args.force_dynamic_quantization is True


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_dense_o_proj_follows_the_cache_that_the_user_asks_for(old: Any, row_wise: Any, dtype: str) -> None:
    cache = import_module("tensorrt_llm.llmapi").KvCacheConfig(dtype=dtype)

    llm = served(row_wise(kv=False), kv_cache_config=cache, dense_o_proj=True)

    assert any(module.dequantized for module in opened(llm).plan.modules) is (dtype == "fp8")


def test_a_prepared_directory_is_made_again_for_the_cache_that_the_user_asks_for(old: Any, row_wise: Any) -> None:
    cache = import_module("tensorrt_llm.llmapi").KvCacheConfig(dtype="fp8")
    directory = row_wise(kv=False)
    made = trtllm_ct.prepare(directory, dense_o_proj=True)
    known = trtllm_ct.prepare(directory, dense_o_proj=True, kv_cache_dtype="fp8")

    llm = served(made, kv_cache_config=cache)

    assert not [module for module in Sidecar.open(made).plan.modules if module.dequantized]
    assert llm.args.model == str(known)
    assert [module for module in opened(llm).plan.modules if module.dequantized]


def test_static_activations_prevent_force_dynamic_quantization(newest: Any, row_wise: Any, caplog: Any) -> None:
    llm = served(row_wise(STATIC_MLP))

    assert llm.args.force_dynamic_quantization is False
    assert any("would change 6 modules with static activation scales" in line for line in caplog.messages)


@pytest.mark.parametrize("wish", [True, False])
def test_the_users_argument_is_kept(newest: Any, row_wise: Any, wish: bool, caplog: Any) -> None:
    llm = served(row_wise(STATIC_MLP), force_dynamic_quantization=wish)

    assert llm.args.force_dynamic_quantization is wish
    assert any("fixed scale" in line for line in caplog.messages) is not wish


def test_dense_o_proj_dequantizes_only_o_proj(engine: Any, row_wise: Any, caplog: Any) -> None:
    llm = served(row_wise(STATIC_MLP), dense_o_proj=True, strict=True)

    dense = [module.name for module in opened(llm).plan.modules if module.dequantized]
    assert dense == [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    assert llm.args.force_dynamic_quantization is False
    assert not any("fixed scale" in line for line in caplog.messages)


def test_what_the_fixed_scale_costs_and_what_helps(row_wise: Any) -> None:
    """The output of attention is rounded to multiples of 2^-9, most of it to zero; both remedies avoid that."""
    directory = row_wise()
    with engine_double.installed("newest", importers=[BINDINGS]):
        want = served(directory, force_dynamic_quantization=True).logits(TOKENS)

    errors = {}
    for generation in engine_double.GENERATIONS:
        with engine_double.installed(generation, importers=[BINDINGS], quantize_activations=True):
            for dense in (False, True):
                errors[generation, dense] = deviation(served(directory, dense_o_proj=dense).logits(TOKENS), want)

    assert errors["old", False] > 3 * errors["old", True]
    assert errors["newest", False] < 2 * errors["newest", True]


def test_strict_raises_where_the_engine_has_no_mode(engine: Any, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "made", scheme="int4-g32")

    with pytest.raises(PlanError, match="--strict"):
        served(built.directory, strict=True)


# Engines.


@pytest.mark.reference
def test_the_reference_engine_runs_although_an_engine_is_installed(engine: Any) -> None:
    from trtllm_ct.reference import ReferenceLLM

    llm = LLM(DEMO, engine="reference")

    assert type(llm) is ReferenceLLM
    assert llm.generate("a", engine.SamplingParams(max_tokens=2, temperature=0.5)).outputs[0].token_ids
    with pytest.raises(UsageError, match=r"SamplingParams\.ignore_eos"):
        llm.generate("a", engine.SamplingParams(ignore_eos=True))


@pytest.mark.reference
@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_the_example_runs_unchanged_in_two_processes(generation: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "TLLM_DOUBLE_GENERATION": generation,
        "TLLM_WORKER_USE_SINGLE_PROCESS": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(engine_double.__file__).parent)]),
    }
    example = ROOT / "examples" / "serve_with_trtllm.py"

    done = subprocess.run(
        [sys.executable, str(example), str(DEMO), "2"], env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "The import statement\nis semantically equivalent" in done.stdout
    assert "TensorRT-LLM" in done.stderr
    assert "runs" in done.stderr


def test_a_config_without_a_quantization_block_is_left_to_the_engine(newest: Any, made: Built) -> None:
    """A config.json without a quantization block is left to the engine, whatever the names of the weights."""
    rewrite_config(made.directory, lambda config: config.pop("quantization_config"))

    with pytest.raises(AssertionError, match="weight"):
        served(made.directory)


class TestModelClasses:
    @pytest.mark.parametrize("name", ["GraniteForCausalLM", "Gemma2ForCausalLM", "DeepseekV2ForCausalLM"])
    def test_a_class_that_the_engine_lacks_is_refused_before_a_sidecar_is_made(
        self, engine: Any, sidecar_cache: Path, tmp_path: Path, name: str
    ) -> None:
        write_checkpoint(tmp_path / "made", config=tiny_config(name), scheme="fp8-channel-token")

        for serve in (lambda: served(tmp_path / "made"), lambda: trtllm_ct.prepare(tmp_path / "made")):
            with pytest.raises(PlanError, match=rf"{name}.*--to dense"):
                serve()

        assert not list(sidecar_cache.glob("*"))

    def test_a_class_that_the_user_registered_is_not_refused(self, engine: Any, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "made", config=tiny_config("GraniteForCausalLM"), scheme="fp8-channel-token")
        utils = sys.modules["tensorrt_llm._torch.models.modeling_utils"]
        utils.register_auto_model("GraniteForCausalLM")(type("Granite", (), {}))

        assert is_sidecar(trtllm_ct.prepare(tmp_path / "made"))


# Converted directories.


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """A directory for one rank: two ranks would cut the only block of k_proj and v_proj apart."""
    write_checkpoint(tmp_path / "blocks", config=tiny_config(hidden=256, heads=4, intermediate=512), scheme="fp8-block")
    convert_checkpoint(tmp_path / "blocks", tmp_path / "out")
    return tmp_path / "out"


def test_sizes_that_a_converted_directory_does_not_hold_are_refused(engine: Any, blocks: Path) -> None:
    """The engine itself would load it, and compute with scales of other rows."""
    assert served(blocks).args.model == str(blocks)
    with pytest.raises(UsageError, match="each rank's 64 rows are no multiple of 128"):
        served(blocks, tensor_parallel_size=2)
    with pytest.raises(UsageError, match="Convert the source again with --tp 2"):
        served(DEMO, tensor_parallel_size=2, speculative_config=_draft(engine, blocks))


def test_the_loader_refuses_them_where_the_engine_tells_it_its_sizes(newest: Any, blocks: Path) -> None:
    loader = import_module(BINDINGS).CompressedTensorsCheckpointLoader()
    mapping = import_module("tensorrt_llm.mapping").Mapping(world_size=2, rank=0, tp_size=2)

    with pytest.raises(UsageError, match="each rank's 64 rows"):
        loader.load_config(str(blocks), mapping=mapping)


def test_a_converted_directory_whose_modes_the_gpu_lacks_is_refused(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(DEMO, tmp_path / "out", engine="stock-1.0", sm=90)
    assert served(tmp_path / "out").args.model == str(tmp_path / "out")
    bindings = import_module(BINDINGS)
    monkeypatch.setattr(bindings, "_sm_of_gpu", lambda: 120)

    with pytest.raises(UsageError, match="W4A16_AWQ has no Linear on SM120"):
        served(tmp_path / "out")
    with pytest.raises(UsageError, match="W4A16_AWQ has no Linear on SM120"):
        trtllm_ct.prepare(tmp_path / "out")
    mapping = import_module("tensorrt_llm.mapping").Mapping(world_size=1, rank=0, tp_size=1)
    with pytest.raises(UsageError, match="--sm 120"):
        bindings.CompressedTensorsCheckpointLoader().load_config(str(tmp_path / "out"), mapping=mapping)


def test_a_directory_for_a_newer_release_causes_a_warning(old: Any, blocks: Path, caplog: Any) -> None:
    served(blocks)

    assert any("stock-1.2, which it was converted for" in line for line in warned(caplog))


@pytest.mark.parametrize(("kv", "dtype", "said"), [(True, "auto", True), (False, "auto", False), (False, "fp8", True)])
def test_a_fixed_scale_in_a_converted_directory_causes_a_warning(
    old: Any, row_wise: Any, tmp_path: Path, kv: bool, dtype: str, said: bool, caplog: Any
) -> None:
    convert_checkpoint(row_wise(kv=kv), tmp_path / "out", engine="stock-1.0")
    cache = import_module("tensorrt_llm.llmapi").KvCacheConfig(dtype=dtype)
    caplog.clear()

    served(tmp_path / "out", kv_cache_config=cache)

    assert ["2 o_proj behind a quantized KV cache" in line for line in warned(caplog)] == [True] * said


def _draft(engine: Any, directory: Path) -> Any:
    return import_module("tensorrt_llm.llmapi").DraftTargetDecodingConfig(speculative_model_dir=str(directory))


@pytest.mark.reference
def test_a_stored_head_that_config_json_ties_is_used_if_it_differs(engine: Any, tmp_path: Path) -> None:
    built = write_checkpoint(
        tmp_path / "made",
        config=tiny_config(hidden=128, tied=True),
        scheme="int4-g64",
        edit=lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"].flip(0)}),
    )
    head = built.stored["lm_head.weight"].double()
    want = plain_logits(built.config | {"tie_word_embeddings": False}, built.dense | {"lm_head.weight": head}, TOKENS)

    assert deviation(served(built.directory).logits(TOKENS), want) < EXACT


@pytest.mark.reference
def test_a_tied_head_without_a_table_serves_as_both(engine: Any, tmp_path: Path) -> None:
    def move(stored: dict[str, Any]) -> None:
        stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")

    built = write_checkpoint(tmp_path / "made", config=tiny_config(hidden=128, tied=True), scheme="int4-g64", edit=move)
    weights = built.dense | {"lm_head.weight": built.dense["model.embed_tokens.weight"]}

    assert deviation(served(built.directory).logits(TOKENS), plain_logits(built.config, weights, TOKENS)) < EXACT
