"""`perplexity` and the texts that it and `calibrate` read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import rewrite, tiny_config, write_checkpoint, write_tokenizer
from command_line import run_cli

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.reference

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text("the import statement of a module, and of another module " * 3)
    return tmp_path / "text"


def model(path: Path, edit: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
    config = tiny_config(vocabulary=300, tie_word_embeddings=False)
    built = write_checkpoint(path, config=config, scheme="int4-g32", tokenizer=True)
    if edit is not None:
        rewrite(built.directory, edit)
    return built.directory


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "large": (lambda stored: stored["lm_head.weight"].mul_(1e6), "infinite", "nats"),
    "nan": (lambda stored: stored["model.norm.weight"].fill_(NAN), "not a number", "not a number"),
    "infinite": (lambda stored: stored["lm_head.weight"].fill_(INF), "not a number", "not a number"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_named_beside_the_results_of_the_others(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    edit, word, difference = DAMAGES[damage]
    good, bad = model(Path("good")), model(Path("bad"), edit)

    shown = run_cli("perplexity", good, bad, "--text", text)
    document = run_cli("perplexity", good, bad, "--text", text, "--json").document

    assert shown.code == 0
    (row,) = (line for line in shown.out.splitlines() if line.strip().startswith(str(bad)))
    assert word in row
    assert row.rstrip().endswith(difference)
    assert f"the perplexity of {bad} is {word}" in " ".join(shown.out.split())
    first, second = document["models"]
    assert first["perplexity"] > 1
    assert second["perplexity"] is None
    assert [str(bad) in warning for warning in document["warnings"]] == [True]
    assert (second["difference"] is None) == (difference != "nats")


def test_all_tokens_are_read_and_counted(tmp_path: Path, text: Path) -> None:
    words = ("perplexity", model(tmp_path / "in"), "--text", text, "--window", 10, "--max-tokens", 19)

    assert "17 tokens predicted, in windows of up to 10" in run_cli(*words).out
    assert run_cli(*words, "--json").document["models"][0]["tokens"] == 17


def test_other_tokens_are_a_usage_error(tmp_path: Path, text: Path) -> None:
    one, other = model(tmp_path / "one"), model(tmp_path / "other")
    write_tokenizer(other, 60)

    done = run_cli("perplexity", one, other, "--text", text)

    assert done.code == 2
    assert "Compare models with one tokenizer" in done.err_words


@pytest.mark.parametrize("command", ["perplexity", "calibrate"])
def test_a_short_text_is_named_by_its_file(tmp_path: Path, text: Path, command: str) -> None:
    text.write_text("t")
    out = [tmp_path / "scales"] if command == "calibrate" else []

    done = run_cli(command, model(tmp_path / "in"), *out, "--text", text)

    assert done.code == 2
    assert f"{text} expected at least two tokens" in done.err_words
    assert "Give a text of at least two tokens" in done.err_words


def test_a_pipe_is_refused_with_the_way_that_reads_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    done = run_cli("perplexity", model(tmp_path / "in"), "--text", tmp_path / "pipe")

    assert done.code == 2
    assert "a named pipe" in done.err_words
    assert "send the text to stdin: --text -" in done.err_words


def test_a_place_without_a_model_is_refused_as_by_other_commands(tmp_path: Path, text: Path) -> None:
    (tmp_path / "empty").mkdir()

    done = run_cli("perplexity", model(tmp_path / "in"), tmp_path / "empty", "--text", text)

    assert (done.code, done.err) == (1, run_cli("generate", tmp_path / "empty", "--prompt", "the").err)
