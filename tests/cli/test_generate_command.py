"""The command `generate`: where the prompt comes from, chat templates, and sampling."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint
from command_line import run_cli

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    return write_checkpoint(directory, config=tiny_config(layers=1), tokenizer=True).directory


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chatty")
    write_checkpoint(directory, config=tiny_config(layers=1), tokenizer=True)
    (directory / "chat_template.jinja").write_text("ab{{ messages[0].content }}{{ 'c' if add_generation_prompt }}")
    return directory


def send(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.reference
class TestPrompts:
    def test_a_template_is_applied_unless_it_is_switched_off(self, chatty: Path) -> None:
        """The answer follows alone; a continuation follows its prompt."""
        arguments = ("generate", chatty, "--max-tokens", "4")
        answer, as_text = run_cli(*arguments, "--prompt", "a"), run_cli(*arguments, "--prompt", "abac", "--no-chat")

        assert (answer.code, as_text.code) == (0, 0)
        assert as_text.out == "abac" + answer.out

    @pytest.mark.parametrize(("option", "chat"), [("--chat", True), ("--no-chat", False)])
    def test_the_document_says_whether_it_was(self, chatty: Path, option: str, chat: bool) -> None:
        done = run_cli("generate", chatty, "--prompt", "a", "--max-tokens", "1", option, "--json")

        assert (done.document["prompt"], done.document["chat"]) == ("a", chat)

    def test_without_a_template_the_text_is_continued(self, plain: Path) -> None:
        done = run_cli("generate", plain, "--prompt", "ab", "--max-tokens", "1", "--chat", "--json")

        assert done.document["chat"] is False

    @pytest.mark.parametrize("content", [b"a b", b"a b\n", b"a b\r\n"])
    def test_a_prompt_from_stdin(self, plain: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
        """The line break that a shell adds is no part of it."""
        send(monkeypatch, content)
        done = run_cli("generate", plain, "--prompt", "-", "--max-tokens", "1", "--json")

        assert done.document["prompt"] == "a b"

    def test_the_lines_of_a_prompt_stay(self, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        send(monkeypatch, "é\n\nb\n\n".encode())
        done = run_cli("generate", plain, "--prompt", "-", "--max-tokens", "1", "--json")

        assert done.document["prompt"] == "é\n\nb\n"

    def test_the_same_seed_gives_the_same_text(self, plain: Path) -> None:
        def text(seed: int, temperature: int = 9) -> str:
            options = ("--temperature", temperature, "--seed", seed)
            return run_cli("generate", plain, "--prompt", "abc", "--max-tokens", "6", *options).out

        assert text(1) == text(1)
        assert len({text(seed) for seed in range(5)}) > 1
        assert text(1, 0) == text(2, 0)


@pytest.mark.parametrize(("content", "found"), [(b"a\xff", "a byte that is none, at 1"), (None, "it closed")])
def test_a_prompt_that_stdin_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, found: str
) -> None:
    send(monkeypatch, content or b"")
    if content is None:
        monkeypatch.setattr(sys, "stdin", None)

    done = run_cli("generate", tmp_path, "--prompt", "-")

    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        "stdin",
        "  expected text in UTF-8",
        f"  found    {found}",
        "  Send the prompt to stdin, or name it.",
    ]


@pytest.mark.parametrize(("option", "value"), [("--temperature", "-1"), ("--seed", "-1"), ("--temperature", "warm")])
def test_values_that_no_sampling_has(tmp_path: Path, option: str, value: str) -> None:
    done = run_cli("generate", tmp_path, "--prompt", "a", option, value)

    assert (done.code, done.out) == (2, "")
    assert option in done.err


@pytest.mark.parametrize(
    ("command", "step", "says"),
    [
        (["verify", "DIR"], "trtllm_ct.verify.verify.check_source", "the same command starts from the beginning"),
        pytest.param(
            ["generate", "DIR", "--prompt", "a"],
            "trtllm_ct.reference.generate.load_model",
            "a smaller --max-tokens takes less time",
            marks=pytest.mark.reference,
        ),
    ],
    ids=["verify", "generate"],
)
def test_ctrl_c_says_how_to_go_on(
    plain: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], step: str, says: str
) -> None:
    """Neither command has written anything."""
    monkeypatch.setattr(step, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))

    done = run_cli(*(plain if argument == "DIR" else argument for argument in command))

    assert (done.code, done.err) == (130, f"Interrupted by SIGINT. Nothing was written; {says}.\n")
