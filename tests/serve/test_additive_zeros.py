"""Asymmetric int4 on engines without a Linear method for it: one is installed, and nothing else changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import Built, tiny_config, write_checkpoint
from oracles import unpack
from plain_model import deviation, golden_of, plain_logits

from trtllm_ct import open_checkpoint
from trtllm_ct.base.errors import PayloadError, PlanError
from trtllm_ct.checkpoint.folder import Folder
from trtllm_ct.convert.executors import open_pool
from trtllm_ct.convert.hf_directory import write_hf_directory
from trtllm_ct.convert.job import Conversion, Job
from trtllm_ct.layouts.packing import packed_words
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.serve.additive_zeros import (
    can_install_additive_zeros,
    has_own_additive_zeros,
    install_additive_zeros,
    uninstall_additive_zeros,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

TOKENS = list(range(5, 25))
EXACT, ROUNDED_ZEROS = 2e-3, 5e-3
"""Bounds on logits, in standard deviations: for equal weights, and for zeros that are rounded to bfloat16."""


@pytest.fixture(params=engine_double.GENERATIONS)
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    with engine_double.installed(request.param) as module:
        yield module


@pytest.fixture
def linears(engine: Any) -> Any:
    """The engine's module `_torch.modules.linear`."""
    from tensorrt_llm._torch.modules import linear

    return linear


@pytest.fixture
def served(linears: Any) -> Iterator[Any]:
    """The engine's module `_torch.modules.linear`, with the method installed."""
    install_additive_zeros(linears)
    yield linears
    uninstall_additive_zeros(linears)


def planned(source: Path, out: Path, **options: Any) -> Path:
    """Write what a plan for the engine delivers to a directory."""
    checkpoint = open_checkpoint(source)
    out.mkdir()
    asked = PlanOptions(**{"to": "tensorrt_llm", **options})
    job = Job(directory=source, options=asked, max_shard_bytes=10**9, files=Folder(out))
    with open_pool() as pool:
        assert pool is not None
        write_hf_directory(Conversion(job, checkpoint, checkpoint.plan_for(asked)), pool, progress=lambda _: None)
    return out


def asymmetric(group_size: int, **more: Any) -> dict[str, Any]:
    """A model whose slices for two ranks are still whole groups."""
    config = tiny_config(hidden=256, intermediate=2 * group_size, vocabulary=64, **more)
    return {"config": config, "scheme": f"int4-g{group_size}-asym"}


def logits_of(engine: Any, directory: Path, tokens: list[int] = TOKENS, **arguments: Any) -> Tensor:
    with engine.LLM(model=directory, skip_tokenizer_init=True, **arguments) as llm:
        logits: Tensor = llm.logits(tokens)
    return logits


@pytest.mark.pairs
@pytest.mark.reference
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("group_size", "model"),
    [(64, {}), (128, {}), (64, {"architecture": "Qwen2ForCausalLM"}), (128, {"dtype": "float16"})],
    ids=["g64", "g128", "biases", "float16"],
)
def test_logits_are_those_of_the_stored_weights_with_zeros_in_the_models_dtype(
    engine: Any, served: Any, tmp_path: Path, group_size: int, model: dict[str, Any], ranks: int
) -> None:
    built = write_checkpoint(tmp_path / "source", **asymmetric(group_size, **model))
    want = plain_logits(built.config, with_rounded_zeros(built, group_size), TOKENS)

    directory = planned(built.directory, tmp_path / "out")
    found = logits_of(engine, directory, tensor_parallel_size=ranks)

    assert deviation(found, want) < EXACT


def with_rounded_zeros(built: Built, group_size: int) -> dict[str, Tensor]:
    """Return exact float32 weights, but with additive zeros (-zero_point * scale) rounded to the model's dtype."""
    weights = built.state_dict(torch.float32)
    for name, packed in built.stored.items():
        module, _, local = name.rpartition(".")
        if local == "weight_zero_point":
            scale = built.stored[f"{module}.weight_scale"]
            zero_point = torch.from_numpy(unpack(packed, packed_words(4, axis=0), tuple(scale.shape)))
            zero = -zero_point * scale.float()
            rounding = zero.to(scale.dtype).float() - zero
            weights[f"{module}.weight"] += rounding.repeat_interleave(group_size, dim=1)
    return weights


@pytest.mark.shared
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_checkpoint_gives_its_golden_logits(
    engine: Any, served: Any, shared: Path, tmp_path: Path, ranks: int
) -> None:
    source = shared / "checkpoints" / "w4a16-g64-asym"
    golden = golden_of(source)
    found = logits_of(engine, planned(source, tmp_path / "out"), golden.prompt, tensor_parallel_size=ranks)
    assert golden.error(found) < ROUNDED_ZEROS


def test_it_computes_the_same_as_the_engines_own_method(tmp_path: Path) -> None:
    """Pull request 19442; the parameters are the same as well, bit by bit."""
    directory = planned(write_checkpoint(tmp_path / "source", **asymmetric(64)).directory, tmp_path / "out")
    found = {}
    for own in (True, False):
        with engine_double.installed("newest", gptq=own) as engine:
            from tensorrt_llm._torch.modules import linear

            assert install_additive_zeros(linear) == (not own)
            with engine.LLM(model=directory, skip_tokenizer_init=True, tensor_parallel_size=2) as llm:
                state = {f"{rank}.{name}": t for rank, m in enumerate(llm.models) for name, t in m.state_dict().items()}
                found[own] = {"logits": llm.logits(TOKENS), **state}
    assert found[True].keys() == found[False].keys()
    assert all(torch.equal(found[True][name], found[False][name]) for name in found[True])


def test_ranks_have_the_slices_of_the_whole_tensor(engine: Any, served: Any, tmp_path: Path) -> None:
    """[K / g, N]: columns of fused Linears by shard, groups of the others by rank."""
    directory = planned(write_checkpoint(tmp_path / "source", **asymmetric(64)).directory, tmp_path / "out")
    zeros = {}
    for ranks in (1, 2):
        with engine.LLM(model=directory, skip_tokenizer_init=True, tensor_parallel_size=ranks) as llm:
            zeros[ranks] = [
                {name: t for name, t in model.state_dict().items() if name.endswith("weight_zero")}
                for model in llm.models
            ]
    (whole,) = zeros[1]
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    for name, sizes in ((f"{attention}.qkv_proj", [256, 128, 128]), (f"{mlp}.gate_up_proj", [128, 128])):
        shards = [part[f"{name}.weight_zero"].split([size // 2 for size in sizes], dim=1) for part in zeros[2]]
        joined = torch.cat([part for parts in zip(*shards, strict=True) for part in parts], dim=1)
        assert torch.equal(joined, whole[f"{name}.weight_zero"])
    for name in (f"{attention}.o_proj", f"{mlp}.down_proj"):
        joined = torch.cat([part[f"{name}.weight_zero"] for part in zeros[2]])
        assert torch.equal(joined, whole[f"{name}.weight_zero"])
    assert len(whole) == 2 * 4


# Installing and uninstalling.


def asymmetric_config(linears: Any) -> Any:
    return linears.QuantConfig(quant_algo="W4A16_GPTQ", group_size=64, has_zero_point=True)


def test_it_is_installed_once_and_uninstalled_completely(linears: Any) -> None:
    stock = linears.get_quant_method
    assert install_additive_zeros(linears)
    first = linears.get_quant_method
    assert install_additive_zeros(linears)
    assert linears.get_quant_method is first
    assert type(linears.get_quant_method(asymmetric_config(linears))) is type(first(asymmetric_config(linears)))

    uninstall_additive_zeros(linears)
    assert linears.get_quant_method is stock
    with pytest.raises(ValueError, match="unsupported quant mode"):
        linears.get_quant_method(asymmetric_config(linears))
    uninstall_additive_zeros(linears)
    assert linears.get_quant_method is stock


@pytest.mark.parametrize("algo", [None, "W4A16_AWQ", "W4A16", "FP8", "MIXED_PRECISION"])
def test_every_other_mode_keeps_the_engines_choice(linears: Any, algo: str | None) -> None:
    config = None if algo is None else linears.QuantConfig(quant_algo=algo)
    stock = type(linears.get_quant_method(config))
    install_additive_zeros(linears)
    assert type(linears.get_quant_method(config)) is stock


def test_an_engine_with_its_own_method_is_not_changed() -> None:
    with engine_double.installed("newest", gptq=True):
        from tensorrt_llm._torch.modules import linear

        stock = linear.get_quant_method
        assert has_own_additive_zeros(linear)
        assert not install_additive_zeros(linear)
        assert linear.get_quant_method is stock


def test_the_installed_method_does_not_count_as_the_engines_own(served: Any) -> None:
    assert not has_own_additive_zeros(served)


# The environment variable, and engines that lack something.


def test_the_environment_variable_forbids_it(linears: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_CT_NO_PATCH", "1")
    stock = linears.get_quant_method
    assert not can_install_additive_zeros(linears)
    with pytest.raises(PlanError, match="TRTLLM_CT_NO_PATCH: expected permission to install a Linear method"):
        install_additive_zeros(linears)
    assert linears.get_quant_method is stock


@pytest.mark.reference
def test_without_the_method_the_plan_dequantizes(engine: Any, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", **asymmetric(64))
    rounded = {name: tensor.float().bfloat16() for name, tensor in built.dense.items()}

    directory = planned(built.directory, tmp_path / "out", additive_zeros=False)

    assert not (directory / "hf_quant_config.json").exists()
    assert deviation(logits_of(engine, directory), plain_logits(built.config, rounded, TOKENS)) < EXACT


@pytest.mark.parametrize(
    ("owner", "name", "named"),
    [
        ("W4A16_AWQ_LinearMethod", "load_weights_vanilla", r"W4A16_AWQ_LinearMethod\.load_weights_vanilla"),
        (None, "W4A16_AWQ_LinearMethod", r"W4A16_AWQ_LinearMethod\.create_weights"),
    ],
)
def test_missing_parts_of_the_engine_are_named(
    linears: Any, monkeypatch: pytest.MonkeyPatch, owner: str | None, name: str, named: str
) -> None:
    monkeypatch.setattr(getattr(linears, owner) if owner else linears, name, None)
    assert not can_install_additive_zeros(linears)
    with pytest.raises(PlanError, match=named) as caught:
        install_additive_zeros(linears)
    assert all("TRTLLM_CT_NO_PATCH=1" in fault.remedy for fault in caught.value.faults)


def test_a_missing_slicing_function_is_named(linears: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears.Linear, "load_shard", lambda self, weights, label, device: None, raising=False)
    with pytest.raises(PlanError, match=r"argument scale_span of Linear\.load_shard"):
        install_additive_zeros(linears)
    monkeypatch.delattr(linears.Linear, "load_shard")
    monkeypatch.delattr(linears, "load_weight_shard")
    with pytest.raises(PlanError, match=r"Linear\.load_shard or load_weight_shard"):
        install_additive_zeros(linears)


def test_a_gemm_without_zeros_is_named(linears: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    older = SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=[])))
    monkeypatch.setattr(torch.ops.trtllm, "finegrained_mixed_dtype_gemm", older)
    with pytest.raises(PlanError, match="argument zeros of trtllm::finegrained_mixed_dtype_gemm"):
        install_additive_zeros(linears)


def test_float32_models_raise(served: Any) -> None:
    with pytest.raises(PlanError, match=r"expected float16 or bfloat16.*, found torch\.float32"):
        served.Linear(64, 32, bias=False, dtype=torch.float32, quant_config=asymmetric_config(served))


# One Linear at a time.


def shard(**more: Tensor | None) -> dict[str, Tensor]:
    """32 rows of 128 columns of ones, in two groups, scaled by 2, minus 1.5; None leaves a tensor out."""
    tensors: dict[str, Tensor | None] = {
        "weight": torch.full((16, 128), 0x11, dtype=torch.uint8),
        "weight_scale": torch.full((32, 2), 2.0),
        "weight_zero": torch.full((32, 2), -1.5),
    }
    return {name: tensor for name, tensor in (tensors | more).items() if tensor is not None}


def fused(linears: Any) -> Any:
    mode = linears.WeightsLoadingConfig(weight_mode=linears.WeightMode.FUSED_GATE_UP_LINEAR)
    config = asymmetric_config(linears)
    return linears.Linear(128, 64, bias=False, quant_config=config, weights_loading_config=mode)


def test_zeros_are_added_to_scaled_codes(served: Any) -> None:
    module = fused(served)
    module.load_weights([shard(), shard(weight_zero=torch.full((32, 2), 3.0))])
    output = module(torch.ones(1, 128))
    assert output[0, :32].eq(0.5 * 128).all()
    assert output[0, 32:].eq(5.0 * 128).all()


def test_an_unfused_linear_keeps_no_pre_quant_scale(served: Any) -> None:
    module = served.Linear(128, 32, bias=False, quant_config=asymmetric_config(served))
    module.load_weights([shard()])
    assert module.pre_quant_scale is None
    assert "pre_quant_scale" not in module.state_dict()


@pytest.mark.parametrize(
    ("zero", "found"), [(None, "none"), (torch.full((32, 1), 1.0), r"\(32, 1\)"), (torch.ones(1, 1), r"\(1, 1\)")]
)
def test_missing_zeros_and_zeros_that_would_be_broadcast_raise(served: Any, zero: Tensor | None, found: str) -> None:
    with pytest.raises(PayloadError, match=rf"shard 1 of 2: expected one .*\(32, 2\), found {found}"):
        fused(served).load_weights([shard(), shard(weight_zero=zero)])


def test_scales_that_the_engine_lays_out_differently_raise(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the zeros would belong to the wrong rows."""
    base = served.W4A16_AWQ_LinearMethod
    stock = base.load_weights_fused_gate_up_linear

    def interleaved(self: Any, module: Any, weights: Any, *args: Any) -> None:
        stock(self, module, weights, *args)
        module.weight_scale.data = module.weight_scale.data.flip(1)

    monkeypatch.setattr(base, "load_weights_fused_gate_up_linear", interleaved)
    rising = torch.arange(64.0).reshape(32, 2)
    with pytest.raises(PayloadError, match="others in TensorRT-LLM's Linear"):
        fused(served).load_weights([shard(weight_scale=rising), shard()])
