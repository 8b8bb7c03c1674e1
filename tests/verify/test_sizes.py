"""`verify_with_sizes`: values and sizes are judged together, and sizes without the source too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from builders import rewrite, tiny_config, write_checkpoint

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.verify.sizes import verify_with_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# 2 K/V heads of 64 rows: one block of 128 rows, which two ranks would cut apart.
BLOCKS = tiny_config(hidden=256, heads=4, intermediate=512)
NORM = "model.norm.weight"


@pytest.fixture(name="pair")
def fixture_pair(tmp_path: Path) -> tuple[Path, Path]:
    source = write_checkpoint(tmp_path / "blocks", config=BLOCKS, scheme="fp8-block").directory
    convert_checkpoint(source, tmp_path / "out")
    return source, tmp_path / "out"


@pytest.mark.parametrize(("tensor", "good"), [(1, True), (2, False)])
def test_sizes_that_the_directory_does_not_hold_are_a_fault(pair: tuple[Path, Path], tensor: int, good: bool) -> None:
    source, out = pair

    assert verify_with_sizes(source, out, Parallel(tensor=tensor)).good is good
    assert verify_with_sizes(out, None, Parallel(tensor=tensor)).good is good


class TestEngineDirectories:
    """Files of ranks are for their own sizes alone, and some for their own GPUs."""

    @pytest.fixture(name="made", params=[None, 80, 90])
    def fixture_made(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, int | None]:
        source = write_checkpoint(tmp_path / "int4", config=BLOCKS, scheme="int4-g64").directory
        convert_checkpoint(
            source,
            tmp_path / "out",
            to="engine",
            parallel=Parallel(tensor=2),
            sm=request.param,
            untested=request.param is not None,
        )
        return source, tmp_path / "out", request.param

    @pytest.mark.parametrize("sm", [80, 89, 90, 100])
    def test_other_gpus_are_a_fault_if_codes_are_in_the_order_of_a_kernel(
        self, made: tuple[Path, Path, int | None], sm: int
    ) -> None:
        source, out, made_for = made

        report = verify_with_sizes(source, out, None, sm)

        assert report.good == (made_for is None or (made_for, sm) in {(80, 80), (80, 89), (90, 90)})

    @pytest.mark.parametrize(
        ("parallel", "good"), [(Parallel(tensor=2), True), (Parallel(), False), (Parallel(tensor=2, pipeline=2), False)]
    )
    def test_other_sizes_are_a_fault(self, made: tuple[Path, Path, int | None], parallel: Parallel, good: bool) -> None:
        assert verify_with_sizes(made[0], made[1], parallel).good is good


def test_faults_of_values_and_of_sizes_are_reported_together(pair: tuple[Path, Path]) -> None:
    source, out = pair

    def damaged(stored: dict[str, Tensor]) -> None:
        stored.pop(NORM)

    rewrite(out, damaged)

    report = verify_with_sizes(source, out, Parallel(tensor=2))

    assert [fault.where for fault in report.faults] == [NORM, str(out)]
