"""`verify_with_sizes`: values and sizes are judged together, and sizes without the source too."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from builders import rewrite, tiny_config, write_checkpoint

from trtllm_ct.base.errors import UsageError
from trtllm_ct.cli.doctor import diagnose
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.convert.sizes import require_sizes
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.engine.requantization import Requantize
from trtllm_ct.verify.sizes import verify_with_sizes
from trtllm_ct.verify.verify import verify_checkpoint

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


class TestWithoutRecord:
    """Where the record can't be read, the sizes are not known: that is a fault, not silence."""

    @pytest.fixture(
        name="damaged",
        params=[
            None,
            [1],
            {},
            {"engine": "stock-1.2"},
            {"engine": "stock-9", "parallel": {"tensor": 2}},
            {"engine": 5, "parallel": {}},
            {"engine": "stock-1.2", "parallel": {"tensor": "2"}},
            {"engine": "stock-1.2", "parallel": {"tensor": 0}},
            {"engine": "stock-1.2", "parallel": {"ranks": 2}},
            {"engine": "stock-1.2", "parallel": {}, "sm": "x"},
        ],
        ids=str,
    )
    def fixture_damaged(self, request: pytest.FixtureRequest, pair: tuple[Path, Path]) -> tuple[Path, Path]:
        path = pair[1] / "hf_quant_config.json"
        document = json.loads(path.read_text())
        del document["planned_for"]
        path.write_text(json.dumps(document | ({} if request.param is None else {"planned_for": request.param})))
        return pair

    @pytest.mark.parametrize("tensor", [None, 1, 2])
    def test_verification_says_so(self, damaged: tuple[Path, Path], tensor: int | None) -> None:
        source, out = damaged
        parallel = None if tensor is None else Parallel(tensor=tensor)
        expected = [f"{out}/hf_quant_config.json: planned_for"]

        assert [fault.where for fault in verify_with_sizes(source, out, parallel).faults] == expected
        if parallel is not None:
            assert [fault.where for fault in verify_with_sizes(out, None, parallel).faults] == expected

    def test_the_loader_refuses_it(self, damaged: tuple[Path, Path]) -> None:
        """With one rank there is nothing to divide, and releases before the record wrote such directories."""
        with pytest.raises(UsageError, match=r"planned_for: .* not known"):
            require_sizes(damaged[1], Parallel(tensor=2))
        assert require_sizes(damaged[1], Parallel()) is not None

    def test_doctor_names_it_as_a_problem(self, damaged: tuple[Path, Path]) -> None:
        served = diagnose(damaged[1], parallel=Parallel(tensor=2)).served

        assert served is not None
        assert [fault.where.rpartition(": ")[2] for fault in served.problems] == ["planned_for"]


def test_directories_of_other_tools_have_no_record_and_are_left_to_the_engine(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "hf_quant_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({key: document[key] for key in ("producer", "quantization")}))

    assert require_sizes(pair[1], Parallel(tensor=2)) is None
    served = diagnose(pair[1], parallel=Parallel(tensor=2)).served
    assert served is not None
    assert served.problems == ()
    assert "no record" in served.warnings[0]
    # As the output of a conversion it is not complete.
    assert not verify_with_sizes(*pair, Parallel(tensor=2)).good


@pytest.mark.parametrize(("tensor", "good"), [(2, True), (3, False)])
def test_plain_weights_must_be_divisible(tmp_path: Path, tensor: int, good: bool) -> None:
    source = write_checkpoint(tmp_path / "blocks", config=BLOCKS, scheme="fp8-block").directory
    convert_checkpoint(source, tmp_path / "out", to="dense")

    assert verify_with_sizes(source, tmp_path / "out", Parallel(tensor=tensor)).good is good


@pytest.mark.parametrize("source", ["int4-g128", "dense"])
def test_a_checkpoint_is_no_conversion(tmp_path: Path, source: str) -> None:
    """Neither of itself nor of another one: one error says so, and none about each module."""
    write_checkpoint(tmp_path / "in", config=BLOCKS, scheme=source)
    write_checkpoint(tmp_path / "other", config=BLOCKS, scheme="int4-g128")

    with pytest.raises(UsageError, match="a compressed-tensors checkpoint, which was not converted"):
        verify_checkpoint(tmp_path / "in", tmp_path / "other")


def test_sizes_of_an_engine_directory_need_its_source(tmp_path: Path) -> None:
    config = tiny_config(dtype="float16", hidden=128, intermediate=128)
    write_checkpoint(tmp_path / "in", config=config, scheme="int4-g64")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", to="engine")

    with pytest.raises(UsageError, match=r"an engine-build checkpoint alone.*verify DIR"):
        verify_with_sizes(tmp_path / "out", None, Parallel(tensor=1))

    assert verify_with_sizes(tmp_path / "in", tmp_path / "out", Parallel(tensor=1)).good


def test_what_was_requantized_is_said_of_a_converted_directory(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="the checkpoint alone"):
        verify_checkpoint(pair[0], requantize=Requantize.parse("all=nvfp4"))
