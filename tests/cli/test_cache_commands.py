"""`trtllm-ct cache`: list the prepared directories, and clear those that no running process uses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
from builders import tiny_config, write_checkpoint
from command_line import Done, run_cli
from engine_fixtures import BINDINGS, let_go_of_sidecars
from fresh_python import run_python
from hub_cache import COMMIT, HubCache
from rich.console import Console

from trtllm_ct import LLM, prepare
from trtllm_ct.cli import machine_report
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.engine.releases import DEFAULT_ENGINE
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.serve.hub import Repository
from trtllm_ct.serve.listing import list_sidecars
from trtllm_ct.serve.sidecar import SIDECAR_FILE, make_sidecar

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = PlanOptions(to="tensorrt_llm")

pytestmark = pytest.mark.usefixtures("sidecar_cache")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", config=tiny_config(hidden=128, layers=1), scheme="int4-g64").directory


def lines(done: Done) -> list[str]:
    return [" ".join(line.split()) for line in done.out.splitlines() if line.strip()]


def rows(done: Done) -> set[str]:
    """Return the rows of the table, below the header and the rule."""
    return set(lines(done)[3:])


# cache list.


@pytest.mark.parametrize("exists", [False, True])
def test_an_empty_cache_is_reported_with_its_directory(sidecar_cache: Path, exists: bool) -> None:
    if exists:
        sidecar_cache.mkdir()

    done = run_cli("cache", "list")

    assert (done.code, done.err) == (0, "")
    assert lines(done) == [f"0 in {sidecar_cache}"]
    assert run_cli("cache", "list", "--json").document == {
        "schema": 1,
        "kind": "cache-list",
        "root": str(sidecar_cache),
        "sidecars": [],
    }
    assert sidecar_cache.exists() is exists, "looking makes nothing"


def test_directories_are_listed_with_source_engine_and_sizes(sidecar_cache: Path, source: Path) -> None:
    one = make_sidecar(source, OPTIONS)
    two = make_sidecar(source, replace(OPTIONS, engine="stock-1.3", parallel=Parallel(tensor=4, pipeline=1, expert=2)))

    done = run_cli("cache", "list")

    assert (done.code, done.err) == (0, "")
    assert lines(done)[:2] == [f"2 in {sidecar_cache}", "sidecar source engine tp pp ep"]
    assert rows(done) == {f"{one.name} {source} {DEFAULT_ENGINE} 1 1 1", f"{two.name} {source} stock-1.3 4 1 2"}


def test_the_document_has_every_option(sidecar_cache: Path, source: Path) -> None:
    options = replace(OPTIONS, parallel=Parallel(tensor=2), dense_o_proj=True, strict=True)
    made = make_sidecar(source, options)

    document = run_cli("cache", "list", "--json").document

    assert document == {
        "schema": 1,
        "kind": "cache-list",
        "root": str(sidecar_cache),
        "sidecars": [
            {
                "directory": str(made),
                "source": str(source),
                "repository": None,
                "options": options.to_dict(),
                "fault": None,
            }
        ],
    }


@pytest.mark.parametrize(("name", "generation"), list(engine_double.GENERATION_OF.items()))
def test_a_directory_made_for_an_engine_is_listed_with_its_capability_set(
    source: Path, name: str, generation: str
) -> None:
    with engine_double.installed(generation, importers=[BINDINGS]):
        LLM(source, skip_tokenizer_init=True)
        made = prepare(source, tensor_parallel_size=2)
        inside = run_cli("cache", "list")
    outside = run_cli("cache", "list")

    assert inside == outside
    assert f"{made.name} {source} {name} 2 1 1" in rows(outside)
    assert len(rows(outside)) == 2
    assert {row.split()[2] for row in rows(outside)} == {name}


@pytest.mark.reference
def test_a_repository_is_listed_by_its_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = HubCache(tmp_path / "hub", monkeypatch).add("org/model", source)
    made = make_sidecar(snapshot, OPTIONS, repository=Repository(name="org/model", revision=COMMIT))

    assert rows(run_cli("cache", "list")) == {f"{made.name} org/model {DEFAULT_ENGINE} 1 1 1"}
    (entry,) = run_cli("cache", "list", "--json").document["sidecars"]
    assert (entry["repository"], entry["source"]) == ("org/model", str(snapshot))


def test_names_that_look_like_markup_are_shown_unchanged(source: Path) -> None:
    place = source.rename(source.with_name("[bold]größe [1] ["))
    made = make_sidecar(place, OPTIONS)

    assert rows(run_cli("cache", "list")) == {f"{made.name} {place} {DEFAULT_ENGINE} 1 1 1"}
    assert run_cli("cache", "list", "--json").document["sidecars"][0]["source"] == str(place)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "JSON"),
        ("[]", "object"),
        ("{}", "KeyError: 'layout'"),
        ('{"layout": 1}', "ValueError: layout 1"),
        ('{"layout": 2, "repository": null}', "KeyError: 'source'"),
    ],
)
def test_a_damaged_directory_is_reported_and_the_others_are_listed(source: Path, text: str, said: str) -> None:
    good = make_sidecar(source, OPTIONS)
    bad = make_sidecar(source, replace(OPTIONS, strict=True))
    (bad / SIDECAR_FILE).write_text(text)

    done, document = run_cli("cache", "list"), run_cli("cache", "list", "--json").document

    assert done.code == 0
    assert lines(done)[0].startswith("1 in ")
    assert f"{good.name} {source} {DEFAULT_ENGINE} 1 1 1" in lines(done)
    assert str(bad / SIDECAR_FILE) in done.out
    entries = {entry["directory"]: entry for entry in document["sidecars"]}
    assert entries[str(good)]["fault"] is None
    fault = entries[str(bad)]["fault"]
    assert str(bad / SIDECAR_FILE) in fault["where"]
    assert said in f"{fault['expected']} {fault['found']}"
    assert (entries[str(bad)]["source"], entries[str(bad)]["options"]) == (None, None)


def test_without_intact_directories_there_is_no_table(source: Path, sidecar_cache: Path) -> None:
    (make_sidecar(source, OPTIONS) / SIDECAR_FILE).write_text("{}")

    done = run_cli("cache", "list")

    assert lines(done)[0] == f"0 in {sidecar_cache}"
    assert "sidecar source engine" not in lines(done)
    assert "Delete the directory and call trtllm_ct.prepare again." in done.out


def test_a_directory_whose_source_is_missing_is_listed(source: Path) -> None:
    made = make_sidecar(source, OPTIONS)
    shutil.rmtree(source)

    assert rows(run_cli("cache", "list")) == {f"{made.name} {source} {DEFAULT_ENGINE} 1 1 1"}


def test_other_files_in_the_cache_are_not_listed(source: Path, sidecar_cache: Path) -> None:
    made = make_sidecar(source, OPTIONS)
    (sidecar_cache / "notes").mkdir()
    (sidecar_cache / "notes" / "readme.md").write_text("mine")
    shutil.copytree(made, sidecar_cache / f".{made.name}.1234.partial", symlinks=True)
    (sidecar_cache / SIDECAR_FILE).write_text("{}")

    assert rows(run_cli("cache", "list")) == {f"{made.name} {source} {DEFAULT_ENGINE} 1 1 1"}


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_loses_no_letter(source: Path, sidecar_cache: Path, width: int) -> None:
    make_sidecar(source, OPTIONS)
    wide, narrow = (_letters(machine_report.sidecars(sidecar_cache, list_sidecars()), each) for each in (400, width))

    assert narrow == wide


def _letters(renderable: Any, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return sorted(letter for letter in capture.get() if not letter.isspace() and letter != "─")


# cache clear.


@pytest.mark.parametrize("exists", [False, True])
def test_an_empty_cache_can_be_cleared(sidecar_cache: Path, exists: bool) -> None:
    if exists:
        sidecar_cache.mkdir()

    done = run_cli("cache", "clear")

    assert (done.code, done.err) == (0, "")
    assert lines(done) == [f"Removed 0 from {sidecar_cache}"]
    assert sidecar_cache.exists() is exists


def test_an_unused_directory_is_removed_and_its_source_is_kept(source: Path, sidecar_cache: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for tensor in (1, 2):
        make_sidecar(source, replace(OPTIONS, parallel=Parallel(tensor=tensor)))
    let_go_of_sidecars()

    done = run_cli("cache", "clear")

    assert (done.code, done.err) == (0, "")
    assert lines(done) == [f"Removed 2 from {sidecar_cache}"]
    assert list(sidecar_cache.iterdir()) == []
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert lines(run_cli("cache", "list")) == [f"0 in {sidecar_cache}"]


def test_a_directory_in_use_is_kept_and_named(source: Path, sidecar_cache: Path) -> None:
    make_sidecar(source, OPTIONS)
    let_go_of_sidecars()
    used = make_sidecar(source, replace(OPTIONS, strict=True))

    done = run_cli("cache", "clear")

    assert done.code == 0
    assert lines(done) == [
        f"Removed 1 from {sidecar_cache}",
        f"{used.name} stays: a running process uses it, or it belongs to another user",
    ]
    assert [path.name for path in sidecar_cache.iterdir()] == [used.name]


def test_the_document_lists_removed_and_used_directories(source: Path, sidecar_cache: Path) -> None:
    free = make_sidecar(source, OPTIONS)
    let_go_of_sidecars()
    used = make_sidecar(source, replace(OPTIONS, strict=True))

    document = run_cli("cache", "clear", "--json").document

    assert document == {
        "schema": 1,
        "kind": "cache-clear",
        "root": str(sidecar_cache),
        "removed": [str(free)],
        "in_use": [str(used)],
        "others": [],
    }


@pytest.mark.parametrize("generation", engine_double.GENERATIONS)
def test_the_directory_of_a_running_model_is_kept(source: Path, generation: str) -> None:
    with engine_double.installed(generation, importers=[BINDINGS]):
        llm = LLM(source, skip_tokenizer_init=True)
        document = run_cli("cache", "clear", "--json").document
        assert document["in_use"] == [llm.args.model]
        assert llm.logits([5, 6, 7]).isfinite().all()


def test_a_damaged_directory_can_be_cleared(source: Path, sidecar_cache: Path) -> None:
    """The message about a damaged directory asks the user to do this."""
    (make_sidecar(source, OPTIONS) / SIDECAR_FILE).write_text("{}")
    let_go_of_sidecars()

    assert lines(run_cli("cache", "clear")) == [f"Removed 1 from {sidecar_cache}"]


def test_a_directory_that_is_not_prepared_is_named_and_kept(sidecar_cache: Path) -> None:
    (sidecar_cache / "mine").mkdir(parents=True)
    (sidecar_cache / "mine" / SIDECAR_FILE).write_text("{}")

    assert lines(run_cli("cache", "clear")) == [
        f"Removed 0 from {sidecar_cache}",
        "mine stays: it is not, or not only, what trtllm_ct.prepare writes",
    ]


def test_foreign_files_are_kept(source: Path, sidecar_cache: Path) -> None:
    make_sidecar(source, OPTIONS)
    let_go_of_sidecars()
    (sidecar_cache / "notes").mkdir()
    (sidecar_cache / "notes" / "readme.md").write_text("mine")

    run_cli("cache", "clear")

    assert [path.name for path in sidecar_cache.rglob("*")] == ["notes", "readme.md"]


def test_another_process_can_clear_a_released_directory(source: Path, sidecar_cache: Path) -> None:
    """Clearing needs neither torch nor an engine."""
    free = make_sidecar(source, OPTIONS)
    let_go_of_sidecars()
    used = make_sidecar(source, replace(OPTIONS, strict=True))
    code = """
        import sys
        from trtllm_ct.cli.commands import main
        sys.argv = ["trtllm-ct", "cache", "clear", "--json"]
        try:
            main()
        except SystemExit as stop:
            assert stop.code in (0, None)
        print([name for name in ("torch", "tensorrt_llm", "transformers") if name in sys.modules], file=sys.stderr)
    """

    done = run_python(code)

    assert json.loads(done.stdout)["removed"] == [str(free)]
    assert json.loads(done.stdout)["in_use"] == [str(used)]
    assert done.stderr == "[]\n"


# Usage.


@pytest.mark.parametrize("arguments", [("cache",), ("cache", "purge"), ("cache", "list", "DIR")], ids=" ".join)
def test_unknown_subcommands_and_options_are_usage_errors(arguments: tuple[str, ...]) -> None:
    done = run_cli(*arguments)

    assert done.code == 2
    assert "cache" in done.out + done.err
