"""The loaded tensors of a rank must match its plan and what the engine reads; any missing or surplus tensor raises.

The tables of names are compared with the engine double, whose Linears and experts record which tensors they read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import tiny_config, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_tensors import stream_delivered

from trtllm_ct.base.errors import LoadError
from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.engine.parallel import ONE_RANK, Parallel, Rank
from trtllm_ct.engine.target import ENGINES, target_named
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.plan import Delivery
from trtllm_ct.plan.ranks.shard import plan_for_rank
from trtllm_ct.serve.completeness import EXPERT_READS, LINEAR_READS, Reads, prove_complete, refuse_missing_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.plan import ModulePlan, Plan

CONFIG = tiny_config(hidden=128, intermediate=256, layers=1)
MIXTRAL = tiny_config("MixtralForCausalLM", hidden=128, kv_heads=4)
ONE_LAYER = MIXTRAL | {"num_hidden_layers": 1}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
LINEARS: dict[QuantAlgo, str] = {
    QuantAlgo.FP8: "fp8-tensor-static",
    QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN: "fp8-channel-token",
    QuantAlgo.FP8_BLOCK_SCALES: "fp8-block",
    QuantAlgo.NVFP4: "nvfp4",
    QuantAlgo.W4A16_NVFP4: "nvfp4a16",
    QuantAlgo.MXFP8: "mxfp8",
    QuantAlgo.W4A8_MXFP4_MXFP8: "mxfp4a16",
    QuantAlgo.W8A16: "int8-channel",
    QuantAlgo.W4A16: "int4-channel",
    QuantAlgo.W4A16_AWQ: "int4-g64",
    QuantAlgo.W4A16_GPTQ: "int4-g64-asym",
}
EXPERTS: dict[QuantAlgo, str] = {
    QuantAlgo.FP8: "fp8-tensor-static",
    QuantAlgo.FP8_BLOCK_SCALES: "fp8-block",
    QuantAlgo.NVFP4: "nvfp4",
    QuantAlgo.W4A16_NVFP4: "nvfp4a16",
    QuantAlgo.MXFP8: "mxfp8",
    QuantAlgo.W4A16_MXFP4: "mxfp4a16",
    QuantAlgo.W4A8_MXFP4_MXFP8: "mxfp4a16",
    QuantAlgo.W8A16: "int8-channel",
    QuantAlgo.W4A8_AWQ: "int4-g128-fp8-static",
}
SMS = {QuantAlgo.W4A16_MXFP4: 90, QuantAlgo.W4A8_AWQ: 90, QuantAlgo.W4A8_MXFP4_MXFP8: 100}
"""The SM for which a mode is planned, if it is planned only when that is known."""


class Shipment:
    """A checkpoint, its plan for one rank of the newest releases, and the tensors loaded for that rank."""

    def __init__(
        self,
        directory: Path,
        rank: Rank = Rank(),  # noqa: B008 (frozen)
        sm: int | None = None,
        **written: Any,
    ) -> None:
        write_checkpoint(directory, **written)
        self._checkpoint = open_checkpoint(directory)
        self.model: Model = self._checkpoint.model
        self.whole: Plan = self._checkpoint.plan("tensorrt_llm", engine="stock-1.3", sm=sm, parallel=rank.parallel)
        self.plan: Plan = plan_for_rank(self.whole, self.model, rank)
        self.weights = self.delivered(self.plan)

    def delivered(self, plan: Plan) -> dict[str, Tensor]:
        parts = stream_delivered(plan, self._checkpoint.catalog)
        return {name: tensor for _module, tensors in parts for name, tensor in tensors.items()}

    def locals_of(self, module: str) -> dict[str, Tensor]:
        return {local: tensor for name, tensor in self.weights.items() for local in [_local(name, module)] if local}


def _local(name: str, module: str) -> str:
    owner, _, local = name.rpartition(".")
    return local if owner == module else ""


def wheres(error: pytest.ExceptionInfo[LoadError]) -> set[str]:
    return {fault.where for fault in error.value.faults}


def edited(plan: Plan, edit: Callable[[ModulePlan], ModulePlan]) -> Plan:
    return replace(plan, modules=tuple(map(edit, plan.modules)))


def without(module: str, local: str) -> Callable[[ModulePlan], ModulePlan]:
    """Return an edit that removes one tensor from a plan."""

    def edit(each: ModulePlan) -> ModulePlan:
        kept = tuple(delivery for delivery in each.deliveries if delivery.name != f"{module}.{local}")
        return replace(each, deliveries=kept)

    return edit


def renamed(module: str, local: str, name: str) -> Callable[[ModulePlan], ModulePlan]:
    """Return an edit that makes a plan deliver one tensor again under another name."""

    def edit(each: ModulePlan) -> ModulePlan:
        found = [delivery for delivery in each.deliveries if delivery.name == f"{module}.{local}"]
        more = [Delivery(name=name, operation=delivery.operation) for delivery in found]
        return replace(each, deliveries=(*each.deliveries, *more))

    return edit


# The tensors of the plan.


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Shipment:
    """Scalars, rows, groups and blocks; native, dequantized and plain modules; scales of the KV cache."""
    scheme = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "fp8-tensor-static"),
        "o_proj": "int4-g64",
        **dict.fromkeys(("gate_proj", "up_proj"), "nvfp4"),
        "down_proj": "int8-g32",
    }
    return Shipment(tmp_path_factory.mktemp("mixed") / "model", config=CONFIG, scheme=scheme, kv=True)


def test_tensors_as_planned_pass(mixed: Shipment) -> None:
    assert prove_complete(mixed.plan, mixed.weights) == ()


def test_a_missing_tensor_is_named_with_its_spec(mixed: Shipment) -> None:
    name = f"{ATTENTION}.o_proj.weight_scale"
    weights = {each: tensor for each, tensor in mixed.weights.items() if each != name}

    with pytest.raises(LoadError) as caught:
        prove_complete(mixed.plan, weights)

    promised, read = caught.value.faults
    assert (promised.where, promised.expected) == (name, "float32 [128, 2]")
    assert promised.found == "no such tensor among those loaded"
    assert "please report it" in promised.remedy
    assert (read.where, read.expected, read.found) == (name, "one, which it reads (W4A16_AWQ g64 Linear)", "none")


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("model.norm.weight", lambda tensor: tensor.float(), "float32 [128]"),
        ("model.norm.weight", lambda tensor: tensor[:-1], "bfloat16 [127]"),
        ("model.norm.weight", lambda tensor: tensor[:0], "bfloat16 [0]"),
        (f"{ATTENTION}.q_proj.weight_scale", lambda tensor: tensor.reshape(1), "float32 [1]"),
        (f"{ATTENTION}.o_proj.weight", lambda tensor: tensor.view(torch.int8), "int8 [64, 128]"),
        (f"{ATTENTION}.o_proj.weight", lambda tensor: tensor.T, "uint8 [128, 64]"),
    ],
    ids=["dtype", "one row less", "no rows", "one element in a vector", "sign of bytes", "transposed"],
)
def test_a_different_dtype_or_shape_is_named(
    mixed: Shipment, name: str, change: Callable[[Tensor], Tensor], found: str
) -> None:
    changed = change(mixed.weights[name])

    with pytest.raises(LoadError) as caught:
        prove_complete(mixed.plan, {**mixed.weights, name: changed})

    (fault,) = caught.value.faults
    assert (fault.where, fault.found) == (name, found)
    assert fault.expected == str(mixed.plan.delivered_specs[name])


@pytest.mark.parametrize(
    "name",
    ["model.norm.bias", "lm_head.weight_scale", "weight", "", f"{ATTENTION}.qkv_proj.weight", f"{MLP}.down_proj.zero"],
    ids=str,
)
def test_a_tensor_outside_the_plan_is_named(mixed: Shipment, name: str) -> None:
    with pytest.raises(LoadError, match="expected a tensor of the plan, found one that it doesn't have") as caught:
        prove_complete(mixed.plan, {**mixed.weights, name: torch.tensor(float("nan"))})

    assert wheres(caught) == {name or "''"}


def test_a_tensor_that_two_modules_deliver_is_named(mixed: Shipment) -> None:
    """The later tensor would silently replace the earlier one."""
    norm = mixed.plan.module("model.norm")
    twice = replace(mixed.plan, modules=(*mixed.plan.modules, replace(norm, name="model.norm_too")))

    with pytest.raises(LoadError, match=r"model\.norm\.weight: expected one module that delivers it, found 2 of them"):
        prove_complete(twice, mixed.weights)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_all_faults_are_named_together_and_nothing_else(mixed: Shipment, data: st.DataObject) -> None:
    names = st.sets(st.sampled_from(sorted(mixed.weights)), max_size=4)
    lost, cast, cut = data.draw(names), data.draw(names), data.draw(names)
    added = data.draw(st.sets(st.text("ab.", max_size=5), max_size=3))
    weights = dict(mixed.weights)
    for name in cast:
        weights[name] = weights[name].to(torch.float64)
    for name in cut:
        weights[name] = weights[name][None]
    weights |= {name: torch.empty(0) for name in added}
    for name in lost:
        del weights[name]

    wrong = lost | cast | cut | added
    if not wrong:
        assert prove_complete(mixed.plan, weights) == ()
        return
    with pytest.raises(LoadError) as caught:
        prove_complete(mixed.plan, weights)
    assert wheres(caught) == {name or "''" for name in wrong}


# What the engine reads: plans that are wrong themselves are found by the tables of names.


@pytest.mark.parametrize(("algo", "scheme"), LINEARS.items(), ids=LINEARS)
def test_a_plan_without_a_tensor_that_a_linear_reads_raises(tmp_path: Path, algo: QuantAlgo, scheme: str) -> None:
    shipped = Shipment(tmp_path / "model", sm=SMS.get(algo), config=CONFIG, scheme=scheme)
    demanded = shipped.locals_of(f"{MLP}.down_proj").keys() - ({"input_scale"} if algo is QuantAlgo.FP8 else set())

    for local in demanded:
        plan = edited(shipped.plan, without(f"{MLP}.down_proj", local))
        with pytest.raises(LoadError) as caught:
            prove_complete(plan, shipped.delivered(plan))
        (fault,) = caught.value.faults
        assert fault.where == f"{MLP}.down_proj.{local}"
        assert fault.expected.startswith(f"one, which it reads ({algo}")
        assert fault.expected.endswith("Linear)")
        assert fault.found == "none"


@pytest.mark.parametrize(("algo", "scheme"), EXPERTS.items(), ids=EXPERTS)
def test_a_plan_without_a_tensor_that_an_expert_reads_raises(tmp_path: Path, algo: QuantAlgo, scheme: str) -> None:
    shipped = Shipment(tmp_path / "model", sm=SMS.get(algo), config=ONE_LAYER, scheme=scheme)
    expert = "model.layers.0.block_sparse_moe.experts.3.w2"

    for local in shipped.locals_of(expert).keys() - {"weight_scale_inv"}:
        plan = edited(shipped.plan, without(expert, local))
        with pytest.raises(LoadError) as caught:
            prove_complete(plan, shipped.delivered(plan))
        (fault,) = caught.value.faults
        assert (fault.where, fault.found) == (f"{expert}.{local}", "none")
        assert re.fullmatch(rf"one, which it reads \({algo}.* expert\)", fault.expected)


@pytest.mark.parametrize("part", ["q_a_proj", "kv_a_proj_with_mqa"])
def test_linears_that_a_class_joins_need_the_second_name_of_their_scales(tmp_path: Path, part: str) -> None:
    """`weight_scale` alone would leave the scales of the joined Linear uninitialized."""
    sizes = {"head_dim": None, "kv_lora_rank": 128, "q_lora_rank": 128, "qk_rope_head_dim": 16}
    config = tiny_config("DeepseekV3ForCausalLM", hidden=128, kv_heads=4, intermediate=128, **sizes)
    shipped = Shipment(tmp_path / "model", config=config, scheme="fp8-block")
    module = f"{ATTENTION}.{part}"
    assert {"weight", "weight_scale", "weight_scale_inv"} == shipped.locals_of(module).keys()

    plan = edited(shipped.plan, without(module, "weight_scale"))
    assert prove_complete(plan, shipped.delivered(plan)) == ()
    plan = edited(shipped.plan, without(module, "weight_scale_inv"))
    with pytest.raises(LoadError) as caught:
        prove_complete(plan, shipped.delivered(plan))
    assert wheres(caught) == {f"{module}.weight_scale_inv"}


def test_fused_linears_need_no_pre_quant_scale(tmp_path: Path) -> None:
    """The engine requires `pre_quant_scale` of an unfused Linear, and never reads it in a fused one."""
    shipped = Shipment(tmp_path / "model", config=CONFIG, scheme="int4-g64")

    assert prove_complete(shipped.plan, shipped.weights) == ()
    assert "pre_quant_scale" in shipped.locals_of(f"{MLP}.down_proj")
    plan = edited(shipped.plan, renamed(f"{MLP}.down_proj", "pre_quant_scale", f"{MLP}.up_proj.pre_quant_scale"))
    with pytest.raises(LoadError, match=r"up_proj\.pre_quant_scale: expected none, as it reads none"):
        prove_complete(plan, shipped.delivered(plan))


def test_an_input_scale_of_row_wise_fp8_raises(tmp_path: Path) -> None:
    """In row-wise FP8, attention would divide by an `input_scale`, and the GEMM would not multiply by it."""
    shipped = Shipment(tmp_path / "model", config=CONFIG, scheme="fp8-channel-token")
    name = f"{ATTENTION}.o_proj.input_scale"
    plan = edited(shipped.plan, renamed(f"{ATTENTION}.o_proj", "weight_scale", name))

    with pytest.raises(LoadError) as caught:
        prove_complete(plan, shipped.delivered(plan))

    (fault,) = caught.value.faults
    assert (fault.where, fault.found) == (name, "one")
    assert fault.expected == "none, as it reads none (FP8_PER_CHANNEL_PER_TOKEN Linear)"


def test_codes_next_to_a_dequantized_weight_raise(tmp_path: Path) -> None:
    shipped = Shipment(tmp_path / "model", config=CONFIG, scheme="int4-g32")
    name = f"{MLP}.up_proj.weight_scale"
    plan = edited(shipped.plan, renamed(f"{MLP}.up_proj", "weight", name))

    with pytest.raises(LoadError, match=r"up_proj\.weight_scale: .*reads none \(dequantized Linear\), found one"):
        prove_complete(plan, shipped.delivered(plan))


def test_aliases_are_accepted_and_not_required(tmp_path: Path) -> None:
    shipped = Shipment(tmp_path / "model", config=ONE_LAYER, scheme="fp8-block")
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    assert shipped.weights[f"{expert}.weight_scale_inv"].equal(shipped.weights[f"{expert}.weight_scale"])

    plan = edited(shipped.plan, without(expert, "weight_scale_inv"))

    assert prove_complete(shipped.plan, shipped.weights) == ()
    assert prove_complete(plan, shipped.delivered(plan)) == ()


@pytest.mark.parametrize(
    ("scheme", "read"),
    [
        ("fp8-tensor-static", True),
        ("nvfp4", True),
        ("nvfp4a16", True),
        ("int4-g64", False),
        ("fp8-channel-token", False),
        ({"o_proj": "int4-g32", "down_proj": "int4-g64"}, False),
        ({**dict.fromkeys(("q_proj", "k_proj", "v_proj"), "int4-g32"), "down_proj": "int4-g64"}, False),
    ],
    ids=["fp8", "nvfp4", "nvfp4 weights", "int4", "row-wise", "plain attention", "dequantized attention"],
)
def test_unread_kv_cache_scales_are_returned(tmp_path: Path, scheme: Any, read: bool) -> None:
    """They are delivered because other modes read them, and are harmless."""
    shipped = Shipment(tmp_path / "model", config=CONFIG, scheme=scheme, kv=True)
    scales = {f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"}
    assert scales <= shipped.weights.keys()

    assert set(prove_complete(shipped.plan, shipped.weights)) == (set() if read else scales)


# The tables themselves, compared with the double.


class Recorder(dict[str, Any]):
    """A dictionary that records which of its tensors are read; a union with it keeps the record."""

    def __init__(self, tensors: dict[str, Any], notes: set[str]) -> None:
        super().__init__(tensors)
        self.notes = notes

    def __getitem__(self, key: str) -> Any:
        self.notes.add(key)
        return super().__getitem__(key)

    def __or__(self, other: dict[str, Any]) -> Recorder:  # type: ignore[override]
        return Recorder({**self, **other}, self.notes)


def load_linear(shipped: Shipment, names: Iterable[str], without: str | None = None) -> tuple[set[str], bool]:
    """Return the tensors that a Linear of the double reads, and whether its output is finite.

    `names` are a module, or the parts of a fused Linear.
    """
    linear = import_module("tensorrt_llm._torch.modules.linear")
    poison = import_module("tensorrt_llm._torch.pyexecutor.model_loader").uninitialized_memory_is_poison
    parts = [shipped.plan.module(name) for name in names]
    layer = parts[0].layer
    assert layer is not None
    assert parts[0].weight is not None
    rows = sum(part.weight.shape[0] for part in parts if part.weight)
    columns = parts[0].weight.shape[1]
    mode = {1: "VANILLA", 2: "FUSED_GATE_UP_LINEAR", 3: "FUSED_QKV_LINEAR"}[len(parts)]
    shards = [shipped.locals_of(part.name) for part in parts]
    notes: set[str] = set()
    recorders = [Recorder({k: v for k, v in each.items() if k != without}, notes) for each in shards]
    with poison():
        module = linear.Linear(
            columns,
            rows,
            bias="bias" in shards[0],
            quant_config=linear.QuantConfig(**layer.to_dict()),
            weights_loading_config=linear.WeightsLoadingConfig(weight_mode=linear.WeightMode[mode]),
        )
        module.load_weights(recorders)
        output = module(torch.ones(1, columns))
    return notes, bool(output.isfinite().all())


@pytest.fixture(scope="module")
def newest() -> Iterator[Any]:
    with engine_double.installed("newest", gptq=True) as engine:
        yield engine


@pytest.mark.parametrize(("algo", "scheme"), LINEARS.items(), ids=LINEARS)
@pytest.mark.parametrize("fused", [False, True], ids=["alone", "fused"])
def test_the_table_of_linears_is_what_the_engine_reads(
    newest: Any, tmp_path: Path, algo: QuantAlgo, scheme: str, fused: bool
) -> None:
    """Without a required tensor there is an error, or uninitialized memory in the result."""
    config = tiny_config("Qwen2ForCausalLM", hidden=128, kv_heads=4, intermediate=128, layers=1)
    shipped = Shipment(tmp_path / "model", sm=SMS.get(algo), config=config, scheme=scheme, kv=True)
    names = [f"{ATTENTION}.{part}_proj" for part in "qkv"] if fused else [f"{MLP}.down_proj"]
    reads = LINEAR_READS[algo]
    demanded = reads.required if fused else reads.required | reads.alone
    optional = {local for name in names for local in shipped.locals_of(name)} & reads.optional

    assert load_linear(shipped, names) == (demanded | optional, True)
    for local in demanded:
        assert not _loads(shipped, names, local), local
    assert not fused or "bias" in optional


def _loads(shipped: Shipment, names: list[str], without: str) -> bool:
    try:
        return load_linear(shipped, names, without)[1]
    except (KeyError, AssertionError, IndexError):
        return False


@pytest.fixture(scope="module")
def asked_of_experts(tmp_path_factory: pytest.TempPathFactory) -> dict[QuantAlgo, set[str]]:
    """All releases and kernels together, because some read a scale only under its second name."""
    home = "model.layers.0.block_sparse_moe.experts."
    shipped = {
        algo: Shipment(
            tmp_path_factory.mktemp("experts") / "model", sm=SMS.get(algo), config=ONE_LAYER, scheme=scheme
        ).weights
        for algo, scheme in EXPERTS.items()
    }
    asked: dict[QuantAlgo, set[str]] = defaultdict(set)
    for generation in engine_double.GENERATIONS:
        with engine_double.installed(generation):
            for algo, weights in shipped.items():
                if algo is QuantAlgo.W4A8_AWQ and generation == "old":
                    continue  # It reads another layout only, which no plan for it has.
                own = {name.removeprefix(home): weights[name] for name in weights if name.startswith(home)}
                for backend in ("CUTLASS", "TRTLLM"):
                    asked[algo] |= _asked_by_experts(algo, backend, own)
    return asked


@pytest.mark.parametrize("algo", EXPERTS)
def test_the_table_of_experts_is_what_the_engine_reads(
    asked_of_experts: dict[QuantAlgo, set[str]], algo: QuantAlgo
) -> None:
    reads, asked = EXPERT_READS[algo], asked_of_experts[algo]

    assert {local.replace("weight_scale_inv", "weight_scale") for local in asked} == reads.required
    assert asked - reads.required == reads.aliases


def _asked_by_experts(algo: QuantAlgo, backend: str, weights: dict[str, Tensor]) -> set[str]:
    """Return the tensor names, the same for every expert; empty if the release has no such experts."""
    interface = import_module("tensorrt_llm._torch.modules.fused_moe.interface")
    quant_config = import_module("tensorrt_llm.models.modeling_utils").QuantConfig(quant_algo=str(algo))
    config = SimpleNamespace(
        mapping=import_module("tensorrt_llm.mapping").Mapping(),
        torch_dtype=torch.bfloat16,
        moe_backend=backend,
        quant_config=quant_config,
    )
    sizes = {"num_experts": 4, "hidden_size": 128, "intermediate_size": 128, "top_k": 2, "renormalize": True}
    experts = interface.MoE(**sizes, model_config=config)
    notes: set[str] = set()
    try:
        experts.create_weights()
    except (ValueError, NotImplementedError):
        return notes
    experts.load_weights([Recorder(weights, notes)])
    by_part = defaultdict(set)
    for name in notes:
        part, _, local = name.rpartition(".")
        by_part[part].add(local)
    assert len(by_part) == 4 * 3
    (asked,) = {frozenset(locals_) for locals_ in by_part.values()}
    return set(asked)


def test_every_mode_that_an_engine_has_is_in_the_tables() -> None:
    for engine in ENGINES:
        held = target_named("tensorrt_llm", engine).capabilities
        assert held.linear <= LINEAR_READS.keys() == LINEARS.keys()
        assert held.experts <= EXPERT_READS.keys() == EXPERTS.keys()


@pytest.mark.parametrize(
    "reads",
    [*LINEAR_READS.values(), *EXPERT_READS.values()],
    ids=[*(f"Linear {algo}" for algo in LINEAR_READS), *(f"expert {algo}" for algo in EXPERT_READS)],
)
def test_no_name_is_both_required_and_optional(reads: Reads) -> None:
    kinds = (reads.required, reads.alone, reads.optional, reads.aliases)
    assert sum(map(len, kinds)) == len(frozenset().union(*kinds))


# Ranks.

SIZES = [Parallel(pipeline=2), Parallel(tensor=2, expert=2), Parallel(tensor=4, pipeline=2, expert=2)]


class Place:
    """A rank, and the modules that it computes with according to the engine's `Mapping`."""

    def __init__(self, mapping: Any) -> None:
        self.rank = Rank.from_mapping(mapping, 2)
        self._layers, self._experts = mapping.pp_layers(2), mapping.ep_experts(4)

    def computes_with(self, module: ModulePlan) -> bool:
        layer, expert = (re.search(rf"{kind}\.(\d+)\.", module.name) for kind in ("layers", "experts"))
        here = layer is None or int(layer[1]) in self._layers
        return bool(module.deliveries) and here and (expert is None or int(expert[1]) in self._experts)


def places(parallel: Parallel) -> list[Place]:
    sizes = {"tp_size": parallel.tensor, "pp_size": parallel.pipeline, "moe_ep_size": parallel.expert}
    world = parallel.tensor * parallel.pipeline
    with engine_double.installed("newest"):
        mapping = import_module("tensorrt_llm.mapping").Mapping
        return [Place(mapping(world_size=world, rank=rank, **sizes)) for rank in range(world)]


@pytest.fixture(scope="module", params=["fp8-tensor-static", "plain experts"])
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "fp8-tensor-static")
    scheme = attention if request.param == "plain experts" else request.param
    return write_checkpoint(tmp_path_factory.mktemp("experts") / "model", config=MIXTRAL, scheme=scheme).directory


@pytest.mark.parametrize("parallel", SIZES, ids=str)
def test_a_rank_needs_only_its_own_stage_and_experts(experts: Path, parallel: Parallel) -> None:
    checkpoint = open_checkpoint(experts)
    whole = checkpoint.plan("tensorrt_llm", engine="stock-1.3", parallel=parallel)

    for place in places(parallel):
        own = plan_for_rank(whole, checkpoint.model, place.rank)
        refuse_missing_modules(whole, own, checkpoint.model, place.rank)
        delivered = stream_delivered(own, checkpoint.catalog)
        weights = {name: tensor for _, tensors in delivered for name, tensor in tensors.items()}
        assert prove_complete(own, weights) == ()
        found = {name.rpartition(".")[0] for name in weights if "layers." in name and name.endswith(".weight")}
        mine = {module.name for module in whole.modules if place.computes_with(module) and "layers." in module.name}
        assert mine <= found
        # The first norm of the next stage is computed at the end of this stage.
        assert all(name.endswith(".input_layernorm") for name in found - mine)


@pytest.mark.parametrize("parallel", SIZES, ids=str)
def test_a_missing_module_of_the_rank_raises(experts: Path, parallel: Parallel) -> None:
    """This holds for every module of the rank, and for no module of another rank."""
    checkpoint = open_checkpoint(experts)
    whole = checkpoint.plan("tensorrt_llm", engine="stock-1.3", parallel=parallel)

    for place in places(parallel):
        own = plan_for_rank(whole, checkpoint.model, place.rank)
        for module in whole.modules:
            left = replace(own, modules=tuple(each for each in own.modules if each.name != module.name))
            missed = _missed(whole, left, checkpoint.model, place.rank)
            assert missed == ({module.name} if place.computes_with(module) else set())


def _missed(whole: Plan, own: Plan, model: Model, rank: Rank) -> set[str]:
    try:
        refuse_missing_modules(whole, own, model, rank)
    except LoadError as error:
        faults = error.faults
    else:
        faults = ()
    for fault in faults:
        assert f"rank {rank.tensor} of stage {rank.pipeline}, which computes with it" in fault.expected
        assert fault.found == "none"
    return {fault.where for fault in faults}


def test_all_missing_modules_are_named_together(experts: Path) -> None:
    checkpoint = open_checkpoint(experts)
    whole = checkpoint.plan("tensorrt_llm", engine="stock-1.3", parallel=ONE_RANK)

    missed = _missed(whole, replace(whole, modules=()), checkpoint.model, Rank())

    assert missed == {module.name for module in whole.modules if module.deliveries}


def test_a_tensor_of_another_stage_is_surplus(tmp_path: Path) -> None:
    parallel = Parallel(pipeline=2)
    first, last = (Rank(parallel=parallel, pipeline=stage, layers=(stage,)) for stage in range(2))
    shipped = Shipment(tmp_path / "model", first, config=tiny_config(hidden=128), scheme="int4-g64")
    other = shipped.delivered(plan_for_rank(shipped.whole, shipped.model, last))

    with pytest.raises(LoadError) as caught:
        prove_complete(shipped.plan, shipped.weights | other)

    assert wheres(caught) == other.keys() - shipped.weights.keys()
    assert all("layers.1." in where for where in wheres(caught) if "layers." in where)
