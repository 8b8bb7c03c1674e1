"""Modules that are alike are decided once, with local names; modules that differ in anything are decided separately."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import fp8_inputs, fp8_weights, int_weights, quantization_block, tiny_config

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.config.quantization_config import Transform
from trtllm_ct.config.reader import CompressedTensorsConfigReader
from trtllm_ct.engine.target import MODELOPT
from trtllm_ct.plan.assign import Assignment, assign_modes, candidates_of
from trtllm_ct.plan.deliver import Dtypes
from trtllm_ct.plan.equalize import OWN, Equalized, Part
from trtllm_ct.plan.kv_cache import KvCache
from trtllm_ct.plan.model_modules import ModelModules
from trtllm_ct.plan.models.sites import Model, Site
from trtllm_ct.plan.stored import StoredModule, Whole
from trtllm_ct.plan.weights import QuantizedWeight, WeightReader

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.plan.plan import ModulePlan

FP8 = {
    "weight": TensorSpec(DType.F8_E4M3, (32, 64)),
    "weight_scale": TensorSpec(DType.BF16, (1,)),
    "input_scale": TensorSpec(DType.BF16, (1,)),
}
PLAIN = {"weight": TensorSpec(DType.BF16, (32, 64))}
SITE = Site(module="model.layers.0.mlp.down_proj", class_name="Linear", shape=(32, 64))
BIAS = {"bias": TensorSpec(DType.BF16, (32,))}
INT4 = {
    "weight_packed": TensorSpec(DType.I32, (32, 8)),
    "weight_scale": TensorSpec(DType.BF16, (32, 1)),
    "weight_shape": TensorSpec(DType.I64, (2,)),
}
INT4_SITE = SITE._replace(module="model.layers.0.self_attn.o_proj")
BLOCKS = {
    "weight": TensorSpec(DType.F8_E4M3, (128, 128)),
    "weight_scale": TensorSpec(DType.BF16, (1, 1)),
}
BLOCKS_SITE = SITE._replace(module="model.layers.0.mlp.up_proj", shape=(128, 128))
GROUPS = {
    "fp8": {"targets": ["Linear"], "weights": fp8_weights("tensor"), "input_activations": fp8_inputs("tensor")},
    "int4": {"targets": ["re:.*o_proj"], "weights": int_weights(4, group_size=64)},
    "blocks": {
        "targets": ["re:.*up_proj"],
        "weights": fp8_weights("block", block_structure=[128, 128]),
        "input_activations": fp8_inputs("group", group_size=128),
    },
}
DEQUANTIZED = Assignment(holding=None, reason="why")


class Planning:
    """A planner of modules with its input: the weight and the mode of all modules that are stored alike."""

    def __init__(self) -> None:
        config = CompressedTensorsConfigReader().read(quantization_block(GROUPS))
        model = Model.from_config(tiny_config())
        self.faults = FaultCollector()
        self.reader = WeightReader(config, self.faults)
        self.modules = ModelModules(
            config=config,
            model=model,
            kv_cache=KvCache(config, MODELOPT, model.kv_heads),
            dtypes=Dtypes(model=DType.BF16, dequantized=DType.BF16, cast_plain=False),
            faults=self.faults,
        )
        self.assigned: dict[int, Assignment] = {}

    def weight(self, stored: StoredModule, site: Site) -> QuantizedWeight | None:
        return self.reader.read(stored, site) if stored.is_quantized else None

    def assignment(self, stored: StoredModule, site: Site, weight: QuantizedWeight | None) -> Assignment | None:
        if weight is None:
            return None
        if id(weight) not in self.assigned:
            candidates = candidates_of([Part(site, stored, weight)], {})
            self.assigned[id(weight)] = assign_modes(candidates, [site], MODELOPT)[site.module]
        return self.assigned[id(weight)]

    def plan(
        self,
        specs: Mapping[str, TensorSpec],
        site: Site = SITE,
        *,
        plain: bool = False,
        equalized: Equalized = OWN,
        transforms: tuple[Transform, ...] = (),
    ) -> ModulePlan:
        """Return the plan of a module with these tensors; it is dequantized with `plain`."""
        views = {local: Whole(name=f"{site.module}.{local}", spec=spec) for local, spec in specs.items()}
        stored = StoredModule(site.module, views, transforms=transforms)
        weight = self.weight(stored, site)
        assignment = DEQUANTIZED if plain else self.assignment(stored, site, weight)
        return self.modules.plan(stored, site, weight, assignment, equalized)


def named(number: int) -> Site:
    return SITE._replace(module=f"model.layers.{number}.mlp.down_proj")


@pytest.mark.parametrize("specs", [FP8, PLAIN], ids=["quantized", "plain"])
def test_modules_that_are_alike_share_one_decision_and_keep_their_names(specs: dict[str, TensorSpec]) -> None:
    planning = Planning()

    first, second = (planning.plan(specs, named(number)) for number in (0, 1))

    assert first.deliveries
    for one, other in zip(first.deliveries, second.deliveries, strict=True):
        assert one.operation is other.operation
        assert (one.name, one.sources) != (other.name, other.sources)
        assert other.name == one.name.replace("layers.0", "layers.1")
        assert other.sources == tuple(source.replace("layers.0", "layers.1") for source in one.sources)
    assert first.layer is second.layer
    assert (first.weight is second.weight, first.reason, first.ignored) == (True, second.reason, second.ignored)
    assert second == Planning().plan(specs, named(1))


MATRIX = {"R_input.weight": TensorSpec(DType.BF16, (64, 64))}
ROTATED = (Transform(name="R", type="hadamard", location="input", targets=("Linear",)),)
EMBEDDING = SITE._replace(class_name="Embedding")
OTHERS = {
    "as it is": lambda planning: planning.plan(FP8),
    "dtype": lambda planning: planning.plan(FP8 | {"weight_scale": TensorSpec(DType.F32, (1,))}),
    "surplus": lambda planning: planning.plan(FP8 | {"output_scale": TensorSpec(DType.BF16, (1,))}),
    "bias": lambda planning: planning.plan(FP8 | BIAS, SITE._replace(locals=("bias",))),
    "assignment": lambda planning: planning.plan(FP8, plain=True),
    "equalized": lambda planning: planning.plan(FP8, equalized=Equalized(note="note", reason="reason")),
    "alone": lambda planning: planning.plan(INT4, INT4_SITE),
    "fused": lambda planning: planning.plan(INT4, INT4_SITE._replace(fused=True)),
    "no expert": lambda planning: planning.plan(BLOCKS, BLOCKS_SITE),
    "expert": lambda planning: planning.plan(BLOCKS, BLOCKS_SITE._replace(expert=True)),
    "cache": lambda planning: planning.plan(
        FP8 | {"output_scale": TensorSpec(DType.BF16, (1,))}, SITE._replace(module="model.layers.0.self_attn.k_proj")
    ),
    "transforms": lambda planning: planning.plan(FP8 | MATRIX, plain=True, transforms=ROTATED),
    "no transforms": lambda planning: planning.plan(FP8 | MATRIX, plain=True),
    "not rotated": lambda planning: planning.plan(PLAIN | MATRIX),
    "rotated": lambda planning: planning.plan(PLAIN | MATRIX, transforms=ROTATED),
    "rotated embedding": lambda planning: planning.plan(PLAIN | MATRIX, EMBEDDING, transforms=ROTATED),
    "plain": lambda planning: planning.plan(PLAIN),
    "leftover": lambda planning: planning.plan(PLAIN | {"weight_scale": TensorSpec(DType.BF16, (1,))}),
    "float32": lambda planning: planning.plan({"weight": TensorSpec(DType.F32, (32, 64))}),
}


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
def test_modules_that_differ_in_one_property_are_decided_separately(order: int) -> None:
    """Each gets the plan that it gets alone, whichever of them comes first."""
    planning = Planning()
    names = list(OTHERS)[::order]

    together = {name: OTHERS[name](planning) for name in (*names, *names)}

    assert together == {name: make(Planning()) for name, make in OTHERS.items()}
    assert not planning.faults.faults


def test_a_fault_is_reported_for_each_module_under_its_name() -> None:
    planning = Planning()
    without_scale = {local: spec for local, spec in FP8.items() if local != "input_scale"}

    for number in (0, 1):
        planning.plan(without_scale | {"odd": TensorSpec(DType.F32, (1,))}, named(number))

    wheres = [fault.where for fault in planning.faults.faults]
    assert wheres == [f"{named(number).module}.{local}" for number in (0, 1) for local in ("input_scale", "odd")]


def test_a_tensor_that_only_another_module_may_have_is_a_fault() -> None:
    planning = Planning()

    planning.plan(FP8 | BIAS, named(0)._replace(locals=("bias",)))
    assert not planning.faults.faults
    planning.plan(FP8 | BIAS, named(1))

    assert [fault.where for fault in planning.faults.faults] == [f"{named(1).module}.bias"]


def test_modules_without_a_name_have_tensors_with_local_names() -> None:
    views = {local: Whole(name=f"a.b.{local}", spec=spec) for local, spec in FP8.items()}
    unnamed = StoredModule("a.b", views, transforms=ROTATED).unnamed

    assert unnamed.specs == FP8
    assert unnamed.transforms == ROTATED
    assert unnamed.delivered_name("weight") == "weight"
    assert unnamed.sources(["weight", "weight_scale"]) == ("weight", "weight_scale")
