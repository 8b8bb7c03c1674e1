"""The command line: exit codes, JSON documents, and the output on stdout and stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from builders import rewrite, tiny_config, write_checkpoint
from command_line import run_cli
from fresh_python import run_python

import trtllm_ct
from trtllm_ct.base.errors import UsageError
from trtllm_ct.cli.options import parse_size
from trtllm_ct.cli.run import SCHEMA
from trtllm_ct.pipeline.open import plan_checkpoint

if TYPE_CHECKING:
    import torch

ROOT = Path(trtllm_ct.__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    scheme = {"o_proj": "int4-g64", "down_proj": "int8-g32"}
    return write_checkpoint(directory, config=tiny_config(layers=1), scheme=scheme, tokenizer=True).directory


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    directory = tmp_path / "broken"
    return write_checkpoint(directory, edit=lambda stored: stored.pop("model.norm.weight")).directory


def run_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m trtllm_ct` in a separate process, with its output in pipes.

    Without `env`, it would inherit the COLUMNS that the library readline sets behind Python's back.
    """
    command = [sys.executable, "-m", "trtllm_ct", *(str(argument) for argument in arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ})


class TestExitCodes:
    def test_0_for_success(self, source: Path, tmp_path: Path):
        for arguments in (
            ("version",),
            ("inspect", source),
            ("plan", source, "--to", "dense"),
            ("convert", source, tmp_path / "out", "--to", "modelopt"),
            ("verify", source),
            ("verify", source, tmp_path / "out"),
        ):
            done = run_cli(*arguments)
            assert (done.code, done.err) == (0, "")
            assert done.out

    @pytest.mark.parametrize("command", ["inspect", "plan", "convert", "verify"])
    def test_1_for_a_faulty_checkpoint(self, broken: Path, tmp_path: Path, command: str):
        options = {"plan": ["--to", "modelopt"], "convert": [tmp_path / "out", "--to", "dense"]}.get(command, [])

        done = run_cli(command, broken, *options)

        assert done.code == 1
        assert "model.norm.weight" in done.out + done.err
        assert bool(done.out) is (command == "inspect")

    def test_1_when_a_conversion_differs_from_its_source(self, source: Path, tmp_path: Path):
        run_cli("convert", source, tmp_path / "out", "--to", "modelopt")
        rewrite(tmp_path / "out", lambda stored: stored["model.norm.weight"].neg_())

        done = run_cli("verify", source, tmp_path / "out")

        assert done.code == 1
        assert "1 faults" in done.out
        assert "model.norm.weight" in done.out

    @pytest.mark.parametrize(
        "arguments",
        [
            ["inspekt", "DIR"],
            ["inspect"],
            ["inspect", "DIR", "--to", "gguf"],
            ["plan", "DIR", "--engine", "0.9"],
            ["plan", "DIR", "--filter", "layers.("],
            ["convert", "DIR", "OUT", "--to", "reference"],
            ["convert", "DIR", "OUT", "--to", "dense", "--dtype", "int8"],
            ["convert", "DIR", "OUT", "--to", "dense", "--max-shard-size", "many"],
            ["convert", "DIR", "DIR", "--to", "dense"],
            ["convert", "DIR", "DIR", "--to", "dense", "--overwrite"],
            ["generate", "DIR"],
            ["generate", "DIR", "--prompt", "x", "--max-tokens", "0"],
        ],
        ids=" ".join,
    )
    def test_2_for_usage_errors(self, source: Path, tmp_path: Path, arguments: list[str]):
        places = {"DIR": source, "OUT": tmp_path / "out"}

        done = run_cli(*(places.get(argument, argument) for argument in arguments))

        assert done.code == 2
        assert done.out == ""
        assert len(done.err.split()) > 5
        assert not (tmp_path / "out").exists()

    def test_2_for_an_existing_output(self, source: Path, tmp_path: Path):
        (tmp_path / "out").mkdir()

        done = run_cli("convert", source, tmp_path / "out", "--to", "dense")

        assert done.code == 2
        assert "replace it with --overwrite" in done.err
        assert run_cli("convert", source, tmp_path / "out", "--to", "dense", "--overwrite").code == 0

    def test_a_directory_of_modelopt_is_the_default(self, source: Path, tmp_path: Path):
        assert run_cli("convert", source, tmp_path / "out").code == 0

        assert (tmp_path / "out" / "hf_quant_config.json").is_file()
        assert run_cli("plan", source).out == run_cli("plan", source, "--to", "modelopt").out

    def test_the_version(self):
        assert run_cli("--version").out == run_cli("version").out != ""

    @pytest.mark.parametrize("command", ["", "inspect", "cache"])
    def test_help_has_a_short_option(self, command: str):
        short, long = (run_cli(*command.split(), option) for option in ("-h", "--help"))

        assert (short.code, short.out) == (0, long.out)

    @pytest.mark.parametrize("command", ["inspect", "plan"])
    def test_a_pipe_has_the_width_of_columns(self, source: Path, monkeypatch: pytest.MonkeyPatch, command: str):
        monkeypatch.delenv("COLUMNS", raising=False)
        wide = run_process(command, source).stdout
        monkeypatch.setenv("COLUMNS", "80")
        narrow = run_process(command, source).stdout

        assert max(map(len, wide.splitlines())) > 80 >= max(map(len, narrow.splitlines()))
        assert "".join(wide.split()).count("q_proj") == "".join(narrow.split()).count("q_proj")

    def test_summaries_of_commands_fit_in_80_columns(self):
        summaries = run_cli("--help").out.partition("Commands:")[2].strip().splitlines()

        assert len(summaries) == 12
        assert not [line for line in summaries if line.endswith("...") or len(line) > 80]

    @pytest.mark.parametrize("group", [(), ("cache",)], ids=str)
    def test_2_and_help_without_a_command(self, group: tuple[str, ...]):
        done = run_cli(*group)

        assert (done.code, done.out) == (2, "")
        assert "Usage: " in done.err
        assert "Commands:" in done.err


class TestDocuments:
    """`--json`: one strict JSON document on stdout, and nothing on stderr."""

    def test_every_command_names_schema_and_kind(self, source: Path, tmp_path: Path):
        for arguments in (
            ("inspect", source),
            ("plan", source, "--to", "modelopt"),
            ("convert", source, tmp_path / "out", "--to", "modelopt"),
            ("verify", source),
            ("verify", source, tmp_path / "out"),
        ):
            done = run_cli(*arguments, "--json")
            assert (done.code, done.err) == (0, "")
            assert list(done.document)[:2] == ["schema", "kind"]
            assert (done.document["schema"], done.document["kind"]) == (SCHEMA, arguments[0])

    def test_a_plan_document_holds_the_plan(self, source: Path):
        done = run_cli("plan", source, "--to", "reference", "--json")

        plan = json.loads(json.dumps(plan_checkpoint(source, "reference").to_dict()))
        assert done.document == {"schema": SCHEMA, "kind": "plan", "alternative": "", **plan}

    def test_a_filter_that_matches_nothing_says_so(self, source: Path):
        done = run_cli("plan", source, "--filter", "nomatch")

        assert done.code == 0
        assert "--filter matches no name" in done.out
        assert "stored tensor" not in done.out
        assert "--filter" not in run_cli("plan", source, "--filter", "q_proj").out

    def test_a_filter_keeps_the_entries_with_such_names(self, source: Path):
        whole = run_cli("plan", source, "--json").document
        some = run_cli("plan", source, "--json", "--filter", r"layers\.0\..*q_proj").document

        for part in ("modules", "stored", "delivered"):
            assert some[part] == [entry for entry in whole[part] if "layers.0.self_attn.q_proj" in entry["name"]] != []
            whole.pop(part), some.pop(part)
        assert some == whole

    def test_inspect_lists_problems_and_still_exits_with_1(self, broken: Path):
        done = run_cli("inspect", broken, "--json")

        assert done.code == 1
        assert done.document["kind"] == "inspect"
        assert [fault["where"] for fault in done.document["problems"]] == ["model.norm.weight"]

    @pytest.mark.parametrize("command", ["plan", "convert", "verify"])
    def test_errors_are_documents_too(self, broken: Path, tmp_path: Path, command: str):
        options = {"plan": ["--to", "modelopt"], "convert": [tmp_path / "out", "--to", "dense"]}.get(command, [])

        done = run_cli(command, broken, *options, "--json")

        assert (done.code, done.err) == (1, "")
        assert done.document["schema"] == SCHEMA
        assert (done.document["kind"], done.document["error"]) == ("error", "PlanError")
        (fault,) = done.document["faults"]
        assert fault.keys() == {"where", "expected", "found", "remedy"}

    @pytest.mark.parametrize("command", ["inspect", "plan --to dense", "doctor"])
    def test_problems_and_warnings_are_both_shown(self, broken: Path, command: str):
        (broken / "training_args.bin").write_bytes(b"")
        name, *options = command.split()

        done, document = run_cli(name, broken, *options), run_cli(name, broken, *options, "--json").document

        shown = done.out + done.err
        assert "pickle files beside safetensors: training_args.bin" in shown
        assert "expected" in shown
        result = document["served"] if name == "doctor" else document
        assert any("training_args.bin" in warning for warning in result["warnings"])
        assert result["faults" if name == "plan" else "problems"]

    def test_a_usage_error_of_this_package_is_a_document_with_exit_code_2(self, source: Path):
        done = run_cli("convert", source, source, "--to", "dense", "--json")

        assert done.code == 2
        assert done.document["error"] == "UsageError"

    def test_a_verification_that_finds_nan_is_strict_json(self, source: Path, tmp_path: Path):
        def write(stored: dict[str, torch.Tensor]) -> None:
            stored["model.layers.0.self_attn.o_proj.weight_scale"][0] = float("nan")

        run_cli("convert", source, tmp_path / "out", "--to", "modelopt")
        rewrite(tmp_path / "out", write)

        done = run_cli("verify", source, tmp_path / "out", "--json")

        assert done.code == 1
        assert not done.document["good"]

    def test_names_beyond_ascii_survive(self, source: Path, tmp_path: Path):
        done = run_cli("convert", source, tmp_path / "größe [1]", "--to", "dense", "--json")

        assert done.document["out"] == str(tmp_path / "größe [1]")


class TestConvert:
    def test_options_reach_the_conversion(self, source: Path, tmp_path: Path):
        options = ("--dtype", "float16", "--max-shard-size", "20 kB")

        done = run_cli("convert", source, tmp_path / "out", "--to", "modelopt", *options, "--json")

        assert len(done.document["weight_files"]) > 2
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"

    def test_strict_names_every_module_and_what_to_do(self, source: Path, tmp_path: Path):
        done = run_cli("convert", source, tmp_path / "out", "--to", "modelopt", "--strict")

        assert done.code == 1
        assert "model.layers.0.mlp.down_proj" in done.err
        assert "Convert without --strict" in done.err


class TestStreams:
    """Commands that run in a process with pipes, as in scripts and continuous integration."""

    def test_python_m_is_the_command(self):
        done = run_process("version")

        assert (done.returncode, done.stdout, done.stderr) == (0, f"{trtllm_ct.__version__}\n", "")

    def test_without_a_terminal_there_is_no_progress_and_no_colour(self, source: Path, tmp_path: Path):
        done = run_process("convert", source, tmp_path / "out", "--to", "modelopt")

        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"Converted to {tmp_path / 'out'} in ")
        assert "\x1b" not in done.stdout

    def test_piped_output_is_not_wrapped(self, broken: Path):
        """Long names and messages stay on one line, so that grep finds them."""
        made = run_process("plan", broken, "--to", "modelopt")
        assert (made.returncode, made.stdout) == (1, "")
        remedy = (
            "No file is missing, so the checkpoint was saved without it: quantize the model again, or ask the author "
            "of the checkpoint. If the model has no such part, config.json describes another one: take it from where "
            "the weights were published."
        )
        assert f"  {remedy}" in made.stderr.splitlines()

        deep = broken.parent / ("long-name-" * 20)
        shown = run_process("inspect", broken.rename(deep))
        assert f"{deep} is a compressed-tensors checkpoint" in shown.stdout.splitlines()

    def test_an_error_is_short(self, tmp_path: Path):
        """The output has no traceback, only the message and the remedy."""
        done = run_process("inspect", tmp_path / "nowhere")

        assert (done.returncode, done.stdout) == (1, "")
        assert "no such directory" in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 4


def test_help_has_no_markup() -> None:
    """Releases of Typer before 0.21.1 print a backslash before `[required]`."""
    done = run_cli("generate", "--help")

    assert done.code == 0
    assert "[required]" in done.out
    assert "\\" not in done.out


def test_objects_are_released_at_the_end_of_the_process() -> None:
    """Extensions such as those of triton report every object that is still alive then as a leak."""
    done = run_python(
        """
        import sys

        class Held:
            def __del__(self):
                print("released")

        held = Held()
        held.itself = held
        sys.modules["holder"] = type(sys)("holder")
        sys.modules["holder"].held = held
        del held
        from trtllm_ct.cli.commands import main
        sys.argv = ["trtllm-ct", "version"]
        main()
        """
    )

    assert done.stdout.splitlines()[-1] == "released"


def test_logs_go_to_stderr() -> None:
    done = run_python(
        """
        import logging, sys

        from trtllm_ct.cli.commands import main

        sys.argv = ["trtllm-ct", "version"]
        try:
            main()
        except SystemExit:
            logging.getLogger("trtllm_ct").warning("a log")
        """
    )

    assert done.stdout == f"{trtllm_ct.__version__}\n"
    assert done.stderr == "a log\n"


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("4096", 4096),
            ("5GB", 5 * 10**9),
            ("5gb", 5 * 10**9),
            ("5 GB", 5 * 10**9),
            ("500MiB", 500 * 2**20),
            ("1.5k", 1500),
            ("2TiB", 2 * 2**40),
            ("7B", 7),
        ],
    )
    def test_units_are_decimal_or_binary(self, text: str, size: int):
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "0", "GB", "-5GB", "5PB", "5 G B", "0.1", "1e9", "five", "9" * 400, "9" * 19])
    def test_anything_else_is_refused_with_examples(self, text: str):
        with pytest.raises(UsageError) as caught:
            parse_size(text)

        (fault,) = caught.value.faults
        assert fault.where == "--max-shard-size"
        assert "5GB, 500MiB or 4096" in fault.expected
        assert fault.found == repr(text)


@pytest.mark.reference
class TestGenerate:
    @pytest.fixture
    def converted(self, source: Path, tmp_path: Path) -> Path:
        run_cli("convert", source, tmp_path / "out", "--to", "modelopt")
        return tmp_path / "out"

    def test_text_of_a_source_and_of_its_conversion_is_the_same(self, source: Path, converted: Path):
        texts = [run_cli("generate", place, "--prompt", "abc", "--max-tokens", "5") for place in (source, converted)]

        assert [done.code for done in texts] == [0, 0]
        assert texts[0].out.startswith("abc")
        assert texts[0].out == texts[1].out

    def test_the_document(self, source: Path):
        done = run_cli("generate", source, "--prompt", "abc", "--max-tokens", "3", "--json")

        assert done.document["kind"] == "generate"
        assert done.document["prompt"] == "abc"
        assert 1 <= len(done.document["token_ids"]) <= 3
        assert done.document["finish_reason"] in {"stop", "length"}
        assert done.document["directory"] == str(source)


def test_convert_says_before_it_writes_that_the_engine_lacks_the_class(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", config=tiny_config("GraniteForCausalLM"), scheme="fp8-channel-token")

    converted = run_cli("convert", source.directory, tmp_path / "out", "--to", "modelopt")
    refused = run_cli("convert", source.directory, tmp_path / "strict", "--to", "modelopt", "--strict")
    dense = run_cli("convert", source.directory, tmp_path / "dense", "--to", "dense")

    assert (converted.code, refused.code, dense.code) == (0, 1, 0)
    for done in (converted, refused):
        assert "GraniteForCausalLM" in done.err
        assert "--to dense" in done.err
    assert dense.err == ""
    assert not (tmp_path / "strict").exists()
    assert run_cli("inspect", source.directory).code == 1
