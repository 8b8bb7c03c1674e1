"""Laws of the plans of engine-build checkpoints: every stored tensor has a fate, every delivered one a place."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from builders import write_checkpoint
from tiny_models import tiny_config

from trtllm_ct.checkpoint.write_plan import WritePlan
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.plan.plan import Fate

if TYPE_CHECKING:
    from trtllm_ct.plan.plan import Plan

SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocabulary": 97, "layers": 3}
SCHEMES = ("dense", "int4-g64", "int4-g64-asym", "fp8-tensor-static", "w8a8", "w8a8-static", "int8-channel", "nvfp4")


@pytest.fixture(scope="module", params=SCHEMES)
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan for two ranks in each of two stages, of a model with biases, a tied head and a quantized cache."""
    config = tiny_config(**SIZES, tied=True, attention_bias=True)
    built = write_checkpoint(tmp_path_factory.mktemp("model"), config=config, scheme=request.param, kv=True)
    return plan_checkpoint(built.directory, "engine", parallel=Parallel(tensor=2, pipeline=2))


def test_every_stored_tensor_has_one_fate_and_ignored_ones_a_reason(plan: Plan) -> None:
    fates = list(plan.fates())

    assert Counter(fate.name for fate in fates) == Counter(plan.stored.keys())
    assert all(fate.reason for fate in fates if fate.fate is Fate.IGNORED)


def test_delivered_tensors_have_one_name_each_and_are_made_from_what_is_read(plan: Plan) -> None:
    sources = {source for delivery in plan.deliveries() for source in delivery.sources}
    reads = {name for module in plan.modules for name in module.reads}

    assert set(Counter(delivery.name for delivery in plan.deliveries()).values()) == {1}
    assert sources == reads


def test_the_places_of_delivered_tensors_fill_the_files_without_overlap(plan: Plan) -> None:
    files = WritePlan.of(plan.delivered_specs, 1, plan.places, ranks=True)
    parts: dict[str, int] = Counter()
    for name, place in plan.places.items():
        parts[place.stack] += plan.delivered_specs[name].nbytes

    assert files.file_names == tuple(f"rank{rank}.safetensors" for rank in range(4))
    assert parts == {name: tensor.spec.nbytes for name, tensor in files.tensors.items()}
    assert files.index is None


def test_pieces_make_what_their_module_delivers(plan: Plan) -> None:
    for module in plan.modules:
        made = tuple(delivery for piece in module.pieces for delivery in piece.deliveries)
        assert made == module.deliveries


def test_the_plan_has_a_json_form(plan: Plan) -> None:
    document = json.loads(json.dumps(plan.to_dict()))

    assert [entry["name"] for entry in document["delivered"]] == list(plan.delivered_specs)
    assert plan.delivered_bytes == sum(spec.nbytes for spec in plan.delivered_specs.values())
