"""Options that commands share: every command that plans has all options of a plan, and `verify` checks them later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

from trtllm_ct.cli.convert_commands import convert
from trtllm_ct.cli.inspect_commands import inspect, plan
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.plan.options import PlanOptions

if TYPE_CHECKING:
    from pathlib import Path

PLANNING = {"inspect": inspect, "plan": plan, "convert": convert}
# `--tp`, `--pp` and `--ep` together are the keyword `parallel`.
OPTIONS = {"parallel": ("tp", "pp", "ep")}
NOT_OF = {"strict": {"inspect"}, "additive_zeros": {*PLANNING}, "kv_cache": {*PLANNING}}
"""Fields of the options that a command does not have: `inspect` refuses no module, and an engine says the other two."""


@pytest.fixture(scope="module")
def row_wise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row-wise FP8 with an FP8 KV cache, whose attention would quantize its output at a fixed scale."""
    config = tiny_config(hidden=128, intermediate=128)
    directory = tmp_path_factory.mktemp("row-wise") / "model"
    return write_checkpoint(directory, config=config, scheme="fp8-channel-token", kv=True).directory


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4 in groups, which engines have in a form for all GPUs and in one for each generation."""
    config = tiny_config(hidden=256, heads=4, intermediate=512)
    return write_checkpoint(tmp_path_factory.mktemp("int4") / "model", config=config, scheme="int4-g64").directory


def types_of(command: str) -> dict[str, Any]:
    return get_type_hints(PLANNING[command], include_extras=True)


@pytest.mark.parametrize("command", PLANNING)
def test_every_field_of_the_options_is_an_option_of_each_command_that_plans(command: str) -> None:
    wanted = {
        option
        for keyword in PlanOptions.__dataclass_fields__
        if command not in NOT_OF.get(keyword, set())
        for option in OPTIONS.get(keyword, (keyword,))
    }

    assert wanted <= types_of(command).keys()


def test_shared_options_have_one_definition() -> None:
    """The same name, the same type and the same help in every command; what a target is chosen for differs."""
    of_option: dict[str, set[Any]] = {}
    for command in PLANNING:
        for option, annotation in types_of(command).items():
            # Headers of a repository are enough for some commands; what a target is chosen for differs too.
            if option not in {"to", "return", "directory"}:
                kind, definition = get_args(annotation)
                of_option.setdefault(option, set()).add((kind, id(definition)))
    assert {option for option, definitions in of_option.items() if len(definitions) > 1} == set()


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_dense_outputs_are_shown_in_advance(row_wise: Path, command: str) -> None:
    def modes(*more: str) -> set[str]:
        document = run_cli(command, row_wise, "--to", "modelopt", "--json", *more).document
        modules = document["plan"]["modules"] if "plan" in document else document["modules"]
        return {module["mode"] for module in modules if module["name"].endswith("o_proj")}

    assert modes() == {"FP8_PER_CHANNEL_PER_TOKEN"}
    assert modes("--dense-o-proj") == {"dequantized"}


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_the_dtype_of_dequantized_modules_is_shown_in_advance(row_wise: Path, command: str) -> None:
    def delivered_bytes(dtype: str) -> int:
        document = run_cli(command, row_wise, "--to", "dense", "--dtype", dtype, "--json").document
        return document["plan"]["delivered_bytes"] if "plan" in document else document["delivered_bytes"]

    assert delivered_bytes("float32") > delivered_bytes("float16") == delivered_bytes("auto")
    assert run_cli(command, row_wise, "--to", "dense", "--dtype", "float8").code == 2


# verify --sm.


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """int4 experts with static FP8 activations, and the directory that was converted for SM90."""
    root = tmp_path_factory.mktemp("experts")
    config = tiny_config("MixtralForCausalLM", hidden=128, intermediate=128)
    write_checkpoint(root / "in", config=config, scheme=dict.fromkeys(("w1", "w2", "w3"), "int4-g128-fp8-static"))
    convert_checkpoint(root / "in", root / "out", sm=90)
    return root / "in", root / "out"


@pytest.mark.parametrize("with_source", [False, True], ids=["alone", "with its source"])
@pytest.mark.parametrize(("sm", "good"), [(90, True), (89, False), (100, False), (120, False)])
def test_verification_says_whether_gpus_run_the_modes(
    experts: tuple[Path, Path], sm: int, good: bool, with_source: bool
) -> None:
    source, out = experts

    done = run_cli("verify", *([source] if with_source else []), out, "--sm", sm, "--json")

    assert done.code == (0 if good else 1)
    faults = done.document["faults"]
    assert len(faults) == (0 if good else 1)
    if not good:
        assert f"SM{sm}" in faults[0]["found"]
        assert "W4A8_AWQ" in faults[0]["found"]
        assert faults[0]["remedy"] == f"Convert the source again with --engine stock-1.2 --sm {sm}."


def test_verification_for_gpus_and_sizes_together(experts: tuple[Path, Path]) -> None:
    _, out = experts

    done = run_cli("verify", out, "--sm", 89, "--tp", 2, "--json")

    found = " ".join(fault["found"] for fault in done.document["faults"])
    assert done.code == 1
    assert "tensor parallel 2" in found
    assert "SM89" in found


def test_verification_for_an_unknown_sm_is_wrong_usage(experts: tuple[Path, Path]) -> None:
    done = run_cli("verify", experts[1], "--sm", 91)

    assert done.code == 2
    assert "--sm" in done.err
    assert "89 or 90 or 100 or 120" in " ".join(done.err.split())


class TestConsentToUntestedFiles:
    """Codes in the order of a kernel are written with two options together, and the summary says what they mean."""

    CONSENT = ("--to", "engine", "--i-know-this-is-untested")

    @pytest.mark.parametrize("command", PLANNING)
    def test_consent_without_a_known_gpu_is_wrong_usage(self, int4: Path, command: str, tmp_path: Path) -> None:
        out = [tmp_path / "out"] if command == "convert" else []
        for more in ((), ("--sm", "100")):
            result = run_cli(command, int4, *out, *self.CONSENT, *more)
            assert result.code == 2
            assert "expected 80 or 89 or 90" in result.err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", ["inspect", "plan"])
    def test_the_mode_is_shown_in_advance(self, int4: Path, command: str) -> None:
        def modes(*more: str) -> set[str]:
            document = run_cli(command, int4, "--to", "engine", "--json", *more).document
            modules = document["plan"]["modules"] if "plan" in document else document["modules"]
            return {module["mode"] for module in modules if module["name"].endswith("_proj")}

        assert modes() == {"W4A16_AWQ g64"}
        assert modes("--sm", "90") == {"W4A16_AWQ g64"}
        assert modes("--sm", "90", self.CONSENT[-1]) == {"W4A16_GPTQ g64"}

    def test_the_summary_says_which_form_was_written(self, int4: Path, tmp_path: Path) -> None:
        shown = run_cli("convert", int4, tmp_path / "awq", "--to", "engine", "--sm", "90").out
        asked = run_cli("convert", int4, tmp_path / "gptq", *self.CONSENT, "--sm", "90").out

        assert "int4 codes are written as W4A16_AWQ, for every GPU" in shown
        assert "W4A16_GPTQ serves GPUs of SM90 and TensorRT-LLM 1.0 to 1.2.1 only" in asked
        assert "(derived) no converter of TensorRT-LLM writes this: W4A16_GPTQ in the order of the kernel" in asked
