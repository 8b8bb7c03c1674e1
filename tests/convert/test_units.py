"""Units of work: every module in one, in an order that fills files side by side."""

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
    """The file that the first tensor of a unit lies in."""
    return write_plan.places[plan.modules[unit.modules[0]].deliveries[0].name].file


def planned(plan: Plan, files: int) -> WritePlan:
    """The write plan with about so many files."""
    return WritePlan.of(plan.delivered_specs, -(-plan.delivered_bytes // files))


@pytest.mark.parametrize("unit_bytes", [1, 10_000, 10**9])
@pytest.mark.parametrize("files", [1, 2, 30])
def test_every_module_that_delivers_is_in_one_unit(
    plan: Plan, unit_bytes: int, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)

    found = plan_units(plan, planned(plan, files))

    delivering = [place for place, module in enumerate(plan.modules) if module.deliveries]
    assert Counter(place for unit in found for place in unit.modules) == Counter(delivering)
    assert [unit.number for unit in found] == list(range(len(found)))
    assert sum(unit.nbytes for unit in found) == plan.delivered_bytes


def test_what_needs_no_torch_begins_at_once_and_the_rest_as_the_second(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker goes ahead while the other one imports torch; on a GPU only what is copied does without."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)

    needs = [unit.needs_torch for unit in plan_units(plan, planned(plan, 1), device="cuda")]

    number = needs.count(False)
    assert number > 2
    assert needs == [False, True, *[False] * (number - 1), *[True] * (len(needs) - number - 1)]


def test_loops_need_no_torch(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)

    assert not any(unit.needs_torch for unit in plan_units(plan, planned(plan, 1)))


@pytest.mark.parametrize("files", [2, 3, 4])
def test_files_are_full_at_about_the_same_time(plan: Plan, files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any time no file is more than one unit ahead of its share."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    write_plan = planned(plan, files)

    order = [file_of(plan, write_plan, unit) for unit in plan_units(plan, write_plan)]

    total, done = Counter(order), Counter[str]()
    assert len(total) >= files
    for place, file in enumerate(order, start=1):
        done[file] += 1
        share = place / len(order)
        assert all(abs(done[each] - share * total[each]) <= 1 for each in total)


def test_large_tensors_come_first(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came last would keep one worker busy, and all others idle; the rest stays in turn."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    usual = [unit.modules for unit in plan_units(plan, planned(plan, 3))]
    sizes = {modules: sum(plan.modules[place].delivered_bytes for place in modules) for modules in usual}
    limit = sorted(sizes.values())[-3]
    assert sizes[usual[0]] < limit
    monkeypatch.setattr(units, "_LARGE", limit)

    found = [unit.modules for unit in plan_units(plan, planned(plan, 3))]

    large = [modules for modules in usual if sizes[modules] >= limit]
    assert set(found[: len(large)]) == set(large)
    assert found[len(large) :] == [modules for modules in usual if modules not in large]


def test_few_files_are_open_at_a_time(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    write_plan = planned(plan, 4 * FILES_AT_ONCE)
    number_of = {file.name: number for number, file in enumerate(write_plan.files)}

    found = plan_units(plan, write_plan)

    rounds = [number_of[file_of(plan, write_plan, unit)] // FILES_AT_ONCE for unit in found]
    assert rounds == sorted(rounds)
    assert rounds[-1] >= 2


def test_the_order_of_the_plan_stays_where_there_is_one_file(plan: Plan) -> None:
    for device in ("cpu", "cuda"):
        found = plan_units(plan, planned(plan, 1), device=device)
        for needs in (True, False):
            places = [place for unit in found if unit.needs_torch is needs for place in unit.modules]
            assert places == sorted(places)
