"""`--tp`, `--pp`, `--ep`, `--strict`: modules that parallel sizes force to be dequantized are reported in advance."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite, tiny_config, write_checkpoint
from command_line import Done, run_cli

from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from trtllm_ct.plan.plan import Plan

# Four heads of 32 columns: two ranks have one group of 64 each in o_proj, four have half of one.
CONFIG = tiny_config(hidden=128, kv_heads=4, intermediate=256)
SCHEME = {"o_proj": "int4-g64", "down_proj": "int4-g64", "gate_proj": "int8-channel", "up_proj": "int8-channel"}
SIZES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (4, 2, 1), (4, 1, 4)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", config=CONFIG, scheme=SCHEME).directory


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with experts of 256 rows, which two slices cut into whole blocks of 128, and more slices do not."""
    config = tiny_config("MixtralForCausalLM", hidden=128, kv_heads=4, intermediate=256)
    return write_checkpoint(tmp_path_factory.mktemp("experts") / "model", config=config, scheme="fp8-block").directory


def options(sizes: tuple[int, int, int]) -> list[Any]:
    return [part for flag, size in zip(("--tp", "--pp", "--ep"), sizes, strict=True) for part in (flag, size)]


def parallel(sizes: tuple[int, int, int]) -> Parallel:
    return Parallel(tensor=sizes[0], pipeline=sizes[1], expert=sizes[2])


def modes(document: dict[str, Any]) -> dict[str, str]:
    return {module["name"]: module["mode"] for module in document["modules"]}


def modes_of(plan: Plan) -> dict[str, str]:
    return {module.name: module.delivered_mode for module in plan.modules}


def in_words(done: Done) -> str:
    return " ".join(done.out.split())


# Documents.


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("to", ["modelopt", "tensorrt_llm"])
def test_a_plan_document_is_made_for_the_sizes(experts: Path, to: str, sizes: tuple[int, int, int]) -> None:
    done = run_cli("plan", experts, "--to", to, *options(sizes), "--json")

    assert (done.code, done.err) == (0, "")
    want = json.loads(json.dumps(plan_checkpoint(experts, to, parallel=parallel(sizes)).to_dict()))
    instead = inspect_checkpoint(experts, to, parallel=parallel(sizes)).alternative
    assert done.document == {"schema": 1, "kind": "plan", "alternative": instead, **want}
    assert done.document["parallel"] == parallel(sizes).to_dict()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_an_inspection_document_is_made_for_the_sizes(experts: Path, sizes: tuple[int, int, int]) -> None:
    done = run_cli("inspect", experts, *options(sizes), "--json")

    assert (done.code, done.err) == (0, "")
    want = json.loads(json.dumps(inspect_checkpoint(experts, parallel=parallel(sizes)).to_dict()))
    assert done.document == {"schema": 1, "kind": "inspect", **want}
    assert modes(done.document) == modes_of(plan_checkpoint(experts, parallel=parallel(sizes)))


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_without_sizes_it_is_one_rank(source: Path, command: str) -> None:
    to = ["--to", "modelopt"]

    assert run_cli(command, source, *to) == run_cli(command, source, *to, *options((1, 1, 1)))
    document = run_cli(command, source, *to, "--json").document
    assert document["parallel"] == {"tensor": 1, "pipeline": 1, "expert": 1, "attention_dp": False}
    assert "dequantized" not in modes(document).values()


# Modules that sizes force to be dequantized.


@pytest.mark.parametrize(("tensor", "lost"), [(1, set()), (2, set()), (4, {"o_proj"})])
def test_a_module_whose_slices_no_mode_holds_is_dequantized(source: Path, tensor: int, lost: set[str]) -> None:
    document = run_cli("inspect", source, "--tp", tensor, "--json").document

    dense = {name for name, mode in modes(document).items() if mode == "dequantized"}
    assert dense == {f"model.layers.{layer}.self_attn.{leaf}" for layer in range(2) for leaf in lost}
    native = {mode for name, mode in modes(document).items() if name.endswith("down_proj")}
    assert native == {"W4A16_AWQ g64"}


def test_the_reason_names_the_slice_and_sizes_that_work(source: Path) -> None:
    done = run_cli("inspect", source, "--tp", 4)

    assert done.code == 0
    assert "model.layers.{0..1}.self_attn.o_proj pack-quantized: int4 group 64 W4A16_GPTQ dequantized" in in_words(done)
    assert "W4A16_AWQ at tensor parallel 4: each rank's 32 columns are no multiple of 64; sizes 1, 2 work" in in_words(
        done
    )


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize("place", ["source", "experts"])
def test_the_sizes_that_a_reason_recommends_work(request: pytest.FixtureRequest, command: str, place: str) -> None:
    """No other valid size works."""
    directory = request.getfixturevalue(place)
    made = run_cli(command, directory, "--to", "modelopt", "--tp", 4, "--json").document
    said = [module for module in made["modules"] if "work" in module.get("reason", "")]
    assert said

    for module in said:
        found = re.search(r"; sizes? ([\d, ]+) works?$", module["reason"])
        assert found, module["reason"]
        for tensor in (1, 2, 4):
            at = modes_of(plan_checkpoint(directory, parallel=Parallel(tensor=tensor)))[module["name"]]
            assert (at != "dequantized") is (str(tensor) in found[1].split(", "))


def test_experts_that_stay_whole_keep_their_mode(experts: Path) -> None:
    """Tensor parallelism 4 slices experts into 64 rows, half a block; expert parallelism slices nothing."""
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    cut, whole = (run_cli("inspect", experts, "--tp", 4, "--ep", ep, "--json").document for ep in (1, 4))

    assert modes(cut)[expert] == "dequantized"
    assert modes(whole)[expert] == "FP8_BLOCK_SCALES g128"


def test_pipeline_parallelism_changes_no_mode(source: Path) -> None:
    one, two = (run_cli("inspect", source, "--pp", size, "--json").document for size in (1, 2))

    assert modes(one) == modes(two)


# Sizes that don't divide the model.


@pytest.mark.parametrize(
    ("sizes", "wheres", "remedy"),
    [
        (("--tp", 3), {"num_attention_heads", "num_key_value_heads", "intermediate_size"}, "that work: 1, 2, 4"),
        (("--tp", 8), {"num_attention_heads"}, "Tensor-parallel sizes that work: 1, 2, 4."),
        (("--pp", 3), {"num_hidden_layers"}, "Use a pipeline-parallel size of at most 2."),
        (("--tp", 8, "--pp", 3), {"num_attention_heads", "num_hidden_layers"}, "of at most 2"),
    ],
    # Explicit ids: the order of sets differs between processes, and test processes must agree on the ids.
    ids=["tp3", "tp8", "pp3", "tp8-pp3"],
)
def test_uneven_sizes_are_problems_by_key(source: Path, sizes: tuple[Any, ...], wheres: set[str], remedy: str) -> None:
    inspected, planned = run_cli("inspect", source, *sizes), run_cli("plan", source, "--to", "modelopt", *sizes)

    assert (inspected.code, planned.code) == (1, 1)
    assert planned.out == ""
    problems = run_cli("inspect", source, *sizes, "--json").document["problems"]
    assert {fault["where"] for fault in problems} == {f"config.json: {key}" for key in wheres}
    assert remedy in in_words(inspected)
    assert remedy in planned.err_words
    faults = run_cli("plan", source, "--to", "modelopt", *sizes, "--json").document["faults"]
    assert faults == problems


def test_experts_that_ranks_cannot_share_are_a_problem(experts: Path) -> None:
    document = run_cli("inspect", experts, "--tp", 8, "--ep", 8, "--json").document

    (fault,) = [fault for fault in document["problems"] if "number of experts" in fault["where"]]
    assert (fault["expected"], fault["found"]) == ("a number that 8 ranks can share evenly", "4")


@pytest.mark.parametrize(
    "sizes",
    [
        ("--tp", 0),
        ("--tp", -1),
        ("--pp", 0),
        ("--ep", 0),
        ("--ep", 2),
        ("--tp", 3, "--ep", 2),
        ("--tp", "two"),
        ("--tp", 1.5),
        ("--tp",),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["inspect", "plan", "convert"])
def test_invalid_sizes_are_usage_errors(source: Path, tmp_path: Path, command: str, sizes: tuple[Any, ...]) -> None:
    places = {"inspect": [], "plan": ["--to", "modelopt"], "convert": [tmp_path / "out", "--to", "modelopt"]}

    done = run_cli(command, source, *places[command], *sizes)

    assert (done.code, done.out) == (2, "")
    assert len(done.err.split()) > 5
    assert not (tmp_path / "out").exists()


def test_sizes_that_do_not_fit_together_are_named_with_the_rule(source: Path) -> None:
    done = run_cli("plan", source, "--to", "modelopt", "--tp", 3, "--ep", 2, "--json")

    assert (done.code, done.document["error"]) == (2, "UsageError")
    (fault,) = done.document["faults"]
    assert fault["where"] == "parallel sizes"
    assert "an expert-parallel size that divides the tensor-parallel one" in fault["expected"]
    assert fault["found"] == "tensor 3, pipeline 1, expert 2"


# --strict.


def test_strict_accepts_a_plan_that_keeps_all_modes(source: Path) -> None:
    for tensor in (1, 2):
        strict = run_cli("plan", source, "--to", "modelopt", "--tp", tensor, "--strict", "--json")
        assert (strict.code, strict.err) == (0, "")
        assert strict.document == run_cli("plan", source, "--to", "modelopt", "--tp", tensor, "--json").document


def test_strict_names_the_modules_that_sizes_would_dequantize(source: Path) -> None:
    done = run_cli("plan", source, "--to", "modelopt", "--tp", 4, "--strict")

    assert (done.code, done.out) == (1, "")
    assert "model.layers.{0..1}.self_attn.o_proj" in done.err
    assert "expected a native mode at target modelopt (--strict)" in done.err_words
    assert "each rank's 32 columns are no multiple of 64; sizes 1, 2 work" in done.err_words
    assert "Convert without --strict" in done.err_words


@pytest.mark.parametrize("to", ["modelopt", "tensorrt_llm"])
def test_strict_refuses_exactly_what_would_be_dequantized(experts: Path, to: str) -> None:
    sizes = ("--to", to, "--tp", 4, "--json")

    loose, strict = run_cli("plan", experts, *sizes), run_cli("plan", experts, *sizes, "--strict")

    dense = {name for name, mode in modes(loose.document).items() if mode == "dequantized"}
    assert dense
    assert (loose.code, strict.code) == (0, 1)
    assert strict.document["error"] == "PlanError"
    assert {fault["where"] for fault in strict.document["faults"]} == dense


def test_strict_reports_a_broken_checkpoint_as_such(tmp_path: Path) -> None:
    """Faults of the files are reported first; modes can't be determined then."""
    directory = write_checkpoint(tmp_path / "model", config=CONFIG, scheme=SCHEME).directory
    rewrite(directory, lambda tensors: tensors.pop("model.norm.weight"))

    done = run_cli("plan", directory, "--to", "modelopt", "--tp", 4, "--strict", "--json")

    assert done.code == 1
    assert {fault["where"] for fault in done.document["faults"]} == {"model.norm.weight"}


def test_strict_conversion_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    done = run_cli("convert", source, tmp_path / "out", "--to", "modelopt", "--tp", 4, "--strict")

    assert (done.code, done.out) == (1, "")
    assert list(tmp_path.iterdir()) == []


def test_sizes_reach_a_conversion(source: Path, tmp_path: Path) -> None:
    for tensor in (2, 4):
        out = tmp_path / str(tensor)
        assert run_cli("convert", source, out, "--to", "modelopt", "--tp", tensor).code == 0
        quantization = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
        named = any(key.endswith("o_proj") for key in quantization["quantized_layers"])
        assert named is (tensor == 2)


# Verification.


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    assert run_cli("convert", source, out).code == 0
    return out


@pytest.mark.parametrize(
    ("sizes", "code"),
    [
        (("--tp", 1), 0),
        (("--pp", 2), 0),
        (("--pp", 3), 1),  # of 2 layers
        (("--tp", 3), 1),
        (("--tp", 0), 2),
        (("--pp", 0), 2),
        (("--ep", 2), 2),  # a part of the tensor-parallel size, which is 1
    ],
    ids=str,
)
@pytest.mark.parametrize("with_source", [True, False])
def test_each_size_that_verify_is_given_is_checked(
    source: Path, converted: Path, with_source: bool, sizes: tuple[str, int], code: int
) -> None:
    done = run_cli("verify", *([source] if with_source else []), converted, *sizes)

    assert done.code == code, done.out + done.err


@pytest.mark.parametrize("option", [("--tp", 2), ("--pp", 2), ("--sm", 90)], ids=str)
def test_sizes_and_gpus_of_a_checkpoint_that_is_not_converted_are_an_error(
    source: Path, option: tuple[str, int]
) -> None:
    done = run_cli("verify", source, *option)

    assert done.code == 2
    assert "verify DIR OUT" in " ".join(done.err.split())
