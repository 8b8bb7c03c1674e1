from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from trtllm_ct.base.errors import ConfigError, UsageError
from trtllm_ct.reference import build_model, generate_text, load_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.reference

# The two bytes of a character are two tokens; <end> is a special token without text.
VOCABULARY = ["<end>", "a", "b", "c", " ", "<0xC3>", "<0xA9>", "x"]


@pytest.fixture
def directory(save_tiny: Callable[..., Path]) -> Path:
    """A random model with a tokenizer that knows a few letters, and bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    path = save_tiny("llama", vocab_size=len(VOCABULARY), bos_token_id=None, eos_token_id=0)
    model = models.BPE({token: index for index, token in enumerate(VOCABULARY)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


def follow(model: Any, *token_ids: int) -> Any:
    """Make the model generate these tokens after any prompt: its last layer depends on the position only."""
    order = iter(token_ids)

    class Script(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            wanted = torch.tensor(next(order)).expand(hidden.shape[:-1])
            return torch.nn.functional.one_hot(wanted, len(VOCABULARY)).float()

    model.lm_head = Script()
    return model


def test_greedy_text_equals_generate_of_transformers(directory: Path) -> None:
    model: Any = load_model(directory)

    got = generate_text(directory, "ab c", max_tokens=12)

    prompt = torch.tensor([[1, 2, 4, 3]])
    want = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    assert list(got.token_ids) == want
    assert got.prompt == "ab c"
    assert got.seconds > 0


def test_the_longest_text_has_max_tokens(directory: Path) -> None:
    got = generate_text(follow(load_model(directory), 1, 2, 3, 1), "a", max_tokens=3)

    assert (got.text, got.token_ids, got.finish_reason) == ("abc", (1, 2, 3), "length")


@pytest.mark.parametrize("max_tokens", [2, 9])
def test_an_end_token_stops_and_is_not_part_of_the_text(directory: Path, max_tokens: int) -> None:
    got = generate_text(follow(load_model(directory), 1, 0, 3), "a", max_tokens=max_tokens)

    assert (got.text, got.token_ids, got.finish_reason) == ("a", (1, 0), "stop")


def test_any_of_several_end_tokens_stops(directory: Path) -> None:
    model: Any = follow(load_model(directory), 1, 7, 3)
    model.generation_config.eos_token_id = [0, 7]

    assert generate_text(model, "a", max_tokens=5).finish_reason == "stop"


def test_a_model_without_end_token_runs_on(directory: Path) -> None:
    model: Any = follow(load_model(directory), 1, 0, 3)
    model.generation_config.eos_token_id = None

    assert generate_text(model, "a", max_tokens=3).token_ids == (1, 0, 3)


def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(directory: Path) -> None:
    """A character of two tokens is reported with the second token."""
    pieces: list[str] = []

    got = generate_text(follow(load_model(directory), 1, 5, 6, 2), "a", max_tokens=4, on_token=pieces.append)

    assert pieces == ["a", "", "é", "b"]
    assert got.text == "aéb"


def test_an_incomplete_character_at_the_end_is_a_replacement_character(directory: Path) -> None:
    pieces: list[str] = []

    got = generate_text(follow(load_model(directory), 1, 5), "a", max_tokens=2, on_token=pieces.append)

    assert got.text == "".join(pieces) == "a\ufffd"


def test_sampling_settings_of_the_checkpoint_do_not_matter(directory: Path) -> None:
    plain = generate_text(directory, "ab", max_tokens=8)
    settings = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "eos_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(settings))

    assert generate_text(directory, "ab", max_tokens=8).token_ids == plain.token_ids


def test_nothing_is_printed(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()

    generate_text(directory, "ab", max_tokens=2)

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("limit", "threads"), [(2**22, 1), (1, 2)])
def test_small_models_compute_on_one_thread(
    directory: Path, monkeypatch: pytest.MonkeyPatch, limit: int, threads: int
) -> None:
    """Synchronization after every tiny operation costs more than it saves; the number of threads is restored."""
    before, seen = torch.get_num_threads(), set()
    monkeypatch.setattr("trtllm_ct.reference.generate._MIN_ELEMENTS_FOR_THREADS", limit)
    torch.set_num_threads(2)
    try:
        generate_text(directory, "ab", max_tokens=2, on_token=lambda _: seen.add(torch.get_num_threads()))

        assert (seen, torch.get_num_threads()) == ({threads}, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "where"), [("", 4, "prompt"), ("a", 0, "max_tokens"), ("a", -1, "max_tokens")]
)
def test_useless_arguments_are_usage_errors(directory: Path, prompt: str, max_tokens: int, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        generate_text(directory, prompt, max_tokens=max_tokens)

    assert caught.value.faults[0].where == where


def test_a_directory_without_tokenizer_is_a_config_error(save_tiny: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        generate_text(save_tiny("llama"), "a", max_tokens=1)


@pytest.mark.parametrize("name", ["", "no/such/place"])
def test_a_model_without_directory_has_no_tokenizer(directory: Path, name: str) -> None:
    """A tokenizer in the current directory is not used either."""
    config = json.loads((directory / "config.json").read_text())
    model = build_model(config, None, load_model(directory).state_dict().items(), name=name)

    with pytest.raises(UsageError, match="Give the checkpoint directory"):
        generate_text(model, "a", max_tokens=1)


@pytest.mark.shared
def test_the_base_checkpoint_writes_readable_text(shared: Path) -> None:
    got = generate_text(shared / "checkpoints" / "_base", "The import statement", max_tokens=40)

    words = got.text.split()
    assert len(words) > 5
    assert sum(word.isalpha() for word in words) > len(words) / 2


TEMPLATE = "{% for m in messages %}{{ m.role[0] | replace('u', 'b') }}{{ m.content }}{% endfor %}"
"""The letter b and the message; with a generation prompt, c."""
WITH_PROMPT = TEMPLATE + "{% if add_generation_prompt %}c{% endif %}"


def with_template(directory: Path, template: str) -> Path:
    (directory / "chat_template.jinja").write_text(template)
    return directory


def prompt_read(directory: Path, **arguments: Any) -> tuple[list[list[int]], bool]:
    """Return the token ids that the model gets at each step, and whether they are said to be those of a template."""
    model: Any = load_model(directory)
    seen: list[list[int]] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, ids: seen.append(ids[0][0].tolist()))
    return seen, generate_text(model, "a", max_tokens=1, **arguments).chat


@pytest.mark.parametrize(
    ("template", "chat", "ids"),
    [(WITH_PROMPT, True, [2, 1, 3]), (WITH_PROMPT, False, [1]), (TEMPLATE, True, [2, 1]), (None, True, [1])],
    ids=["asked for", "not asked for", "without a generation prompt", "none"],
)
def test_the_chat_template_of_the_tokenizer(directory: Path, template: str | None, chat: bool, ids: list[int]) -> None:
    if template is not None:
        with_template(directory, template)
    (seen,), templated = prompt_read(directory, chat=chat)

    assert seen == ids
    assert templated is (chat and template is not None)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected"),
        ("{{ messages[1].content.upper() }}", "no element 1"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_templates_that_can_not_be_applied(directory: Path, template: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        generate_text(with_template(directory, template), "a", max_tokens=1, chat=True)

    assert found in caught.value.faults[0].found
    assert "--no-chat" in caught.value.faults[0].remedy


def test_a_template_does_not_make_a_prompt_of_nothing(directory: Path) -> None:
    with pytest.raises(UsageError, match="prompt: expected text of one token or more"):
        generate_text(with_template(directory, WITH_PROMPT), "", max_tokens=1, chat=True)


def test_a_temperature_samples_and_the_seed_repeats_it(directory: Path) -> None:
    def sampled(seed: int | None, temperature: float | None = 5.0) -> tuple[int, ...]:
        return generate_text(directory, "ab", max_tokens=8, temperature=temperature, seed=seed).token_ids

    assert sampled(3) == sampled(3)
    assert sampled(None) == sampled(0)
    assert len({sampled(seed) for seed in range(6)}) > 1
    assert sampled(7, 0) == sampled(8, None) == generate_text(directory, "ab", max_tokens=8).token_ids


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_temperatures_that_are_none(directory: Path, value: float) -> None:
    with pytest.raises(UsageError, match="temperature: expected a number of at least 0"):
        generate_text(directory, "a", max_tokens=1, temperature=value)
