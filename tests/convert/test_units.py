"""Units of work: every module is in one unit, and the order of units fills several files evenly."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from builders import write_checkpoint

from trtllm_ct.checkpoint.write_plan import WritePlan
from trtllm_ct.convert import units
from trtllm_ct.convert.units import FILES_AT_ONCE, Unit, plan_units
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from trtllm_ct.plan.plan import Plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_checkpoint(write_checkpoint(tmp_path_factory.mktemp("int4"), scheme="int4-g64").directory)


def file_of(plan: Plan, write_plan: WritePlan, unit: Unit) -> str:
    """Return the name of the file that holds the first tensor of a unit."""
    return write_plan.places[plan.modules[unit.modules[0]].deliveries[0].name].file


def planned(plan: Plan, files: int) -> WritePlan:
    """Return a write plan with about `files` files."""
    return WritePlan.of(plan.delivered_specs, -(-plan.delivered_bytes // files))


@pytest.mark.parametrize("unit_bytes", [1, 10_000, 10**9])
@pytest.mark.parametrize("files", [1, 2, 30])
def test_every_module_that_delivers_is_in_one_unit(
    plan: Plan, unit_bytes: int, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)

    planned_units = plan_units(plan, planned(plan, files))

    delivering = [place for place, module in enumerate(plan.modules) if module.deliveries]
    assert Counter(place for unit in planned_units for place in unit.modules) == Counter(delivering)
    assert [unit.number for unit in planned_units] == list(range(len(planned_units)))
    assert sum(unit.nbytes for unit in planned_units) == plan.delivered_bytes


@pytest.mark.parametrize("files", [2, 3, 4])
def test_files_fill_up_evenly(plan: Plan, files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time, each file is within one unit of its share."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    write_plan = planned(plan, files)

    order = [file_of(plan, write_plan, unit) for unit in plan_units(plan, write_plan)]

    total, done = Counter(order), Counter[str]()
    assert len(total) >= files
    for place, file in enumerate(order, start=1):
        done[file] += 1
        share = place / len(order)
        assert all(abs(done[name] - share * total[name]) <= 1 for name in total)


def test_large_tensors_come_first(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor at the end would keep one worker busy and leave the others idle; other units keep their order."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    usual = [unit.modules for unit in plan_units(plan, planned(plan, 3))]
    sizes = {modules: sum(plan.modules[place].delivered_bytes for place in modules) for modules in usual}
    limit = sorted(sizes.values())[-3]
    assert sizes[usual[0]] < limit
    monkeypatch.setattr(units, "_LARGE", limit)

    planned_units = [unit.modules for unit in plan_units(plan, planned(plan, 3))]

    large = [modules for modules in usual if sizes[modules] >= limit]
    assert set(planned_units[: len(large)]) == set(large)
    assert planned_units[len(large) :] == [modules for modules in usual if modules not in large]


def test_few_files_are_filled_at_a_time(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    write_plan = planned(plan, 4 * FILES_AT_ONCE)
    number_of = {file.name: number for number, file in enumerate(write_plan.files)}

    planned_units = plan_units(plan, write_plan)

    rounds = [number_of[file_of(plan, write_plan, unit)] // FILES_AT_ONCE for unit in planned_units]
    assert rounds == sorted(rounds)
    assert rounds[-1] >= 2


def test_with_one_file_units_keep_the_order_of_the_plan(plan: Plan) -> None:
    places = [place for unit in plan_units(plan, planned(plan, 1)) for place in unit.modules]

    assert places == sorted(places)


@pytest.mark.parametrize("unit_bytes", [1, 10_000, 10**9])
def test_with_shards_units_follow_them_and_read_the_same_ones(
    plan: Plan, unit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other tensor is in another file, but for those of a fused Linear, whose parts stay together."""
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    stored = sorted({name for module in plan.modules for name in module.reads})
    shard_of = {name: f"shard-{number // 5}" for number, name in enumerate(stored)}

    planned_units = plan_units(plan, planned(plan, 3), shard_of)

    delivering = [place for place, module in enumerate(plan.modules) if module.deliveries]
    assert Counter(place for unit in planned_units for place in unit.modules) == Counter(delivering)
    groups: dict[str, set[int]] = {}
    for unit in planned_units:
        for place in unit.modules:
            groups.setdefault(plan.modules[place].fused_linear or plan.modules[place].name, set()).add(unit.number)
    assert all(len(numbers) == 1 for numbers in groups.values())
    read = [
        tuple(sorted({shard_of[name] for place in unit.modules for name in plan.modules[place].reads}))
        for unit in planned_units
    ]
    assert read == sorted(read)
    if unit_bytes == 10**9:
        assert len(read) == len(set(read)) > 1
