"""The perplexity of a text is what transformers' own loss says, window by window."""

from __future__ import annotations

import json
from functools import partial
from math import exp, inf, isnan, nan
from typing import TYPE_CHECKING

import pytest
import torch
from builders import tiny_config, write_checkpoint, write_tokenizer

from trtllm_ct.base.errors import ConfigError, UsageError
from trtllm_ct.reference import (
    Perplexity,
    generate_text,
    load_model,
    measure_scales,
    text_perplexities,
    text_perplexity,
)
from trtllm_ct.reference.generate import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from builders import Built

pytestmark = pytest.mark.reference

TEXT = "the import statement of a module, the module of an import statement; " * 12


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return write_checkpoint(tmp_path / "in", config=tiny_config(vocabulary=300), scheme="int4-g32", tokenizer=True)


@pytest.mark.parametrize("window", [2, 7, 64, len(TEXT) - 1, 10_000])
def test_it_is_the_loss_of_each_window(built: Built, window: int) -> None:
    """The last window may be shorter; only a token that is alone in it is not read."""
    model = load_model(built.directory, dtype=torch.float32)
    token_ids = load_tokenizer(str(built.directory))(TEXT)["input_ids"]
    windows = [token_ids[at : at + window] for at in range(0, len(token_ids) - 1, window)]
    counts = [len(ids) - 1 for ids in windows]
    with torch.no_grad():
        losses = [float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in windows]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)

    found = text_perplexity(model, TEXT, window=window)

    assert found.perplexity == pytest.approx(exp(mean), rel=1e-5)
    assert (found.tokens, found.window) == (sum(counts), len(windows[0]))
    assert found.difference(text_perplexity(built.directory, TEXT, window=window)) == 0


def test_a_wrong_weight_shows(built: Built) -> None:
    before, model = text_perplexity(built.directory, TEXT), load_model(built.directory, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)

    assert before.difference(text_perplexity(model, TEXT)) > 0.01


@pytest.mark.parametrize(("text", "window"), [("", 8), (TEXT, 1), (TEXT, 0)])
def test_a_text_needs_two_tokens_and_a_window_too(built: Built, text: str, window: int) -> None:
    with pytest.raises(UsageError):
        text_perplexity(built.directory, text, window=window)


@pytest.mark.parametrize(
    ("text", "arguments", "where", "remedy"),
    [
        ("", {}, "text", "Give a text of at least two tokens; thousands of them say more."),
        ("t", {}, "text", "Give a text of at least two tokens; thousands of them say more."),
        (TEXT, {"window": 1}, "window", "Read at least two tokens together."),
        (TEXT, {"max_tokens": 1}, "max_tokens", "Read two tokens of the text or more."),
        (TEXT, {"max_tokens": -5}, "max_tokens", "Read two tokens of the text or more."),
    ],
)
def test_each_cause_has_a_remedy_of_its_own(
    built: Built, text: str, arguments: dict[str, int], where: str, remedy: str
) -> None:
    with pytest.raises(UsageError) as caught:
        text_perplexity(built.directory, text, **arguments)

    (fault,) = caught.value.faults
    assert (fault.where, fault.remedy) == (where, remedy)


@pytest.mark.parametrize(
    ("likelihoods", "perplexity", "reason"),
    [
        ([700.0, 709.0], exp(704.5), ""),
        ([1e6, 1.0], inf, "infinite"),
        ([inf, 1.0], inf, "infinite"),
        ([nan, 1.0], nan, "not a number, since 1 of 2"),
        ([inf, nan], nan, "not a number"),
    ],
)
def test_a_perplexity_that_is_no_finite_number_is_a_warning_and_null(
    likelihoods: list[float], perplexity: float, reason: str
) -> None:
    found = Perplexity(
        model="DIR", tokens=2, window=3, seconds=0.0, windows=[[0, 1, 2]], likelihoods=torch.tensor(likelihoods)
    )

    assert found.perplexity == pytest.approx(perplexity, nan_ok=True)
    assert [f"the perplexity of DIR is {reason}" in warning for warning in found.warnings] == [True] * bool(reason)
    document = json.loads(json.dumps(found.to_dict(found), allow_nan=False))
    assert document["perplexity"] == (None if reason else pytest.approx(perplexity))
    assert (document["mean"] is None) == (isnan(found.mean) or found.mean == inf)
    assert document["difference"] in ({0} if found.mean < inf else {None})


def test_models_that_read_other_tokens_are_refused_before_one_runs(built: Built, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", config=tiny_config(vocabulary=300), scheme="int4-g32", tokenizer=True)
    _exchange(other.directory / "tokenizer.json", "i", "m")
    other.directory.joinpath("model.safetensors").unlink()  # whoever loads it fails

    with pytest.raises(UsageError, match="Compare models with one tokenizer") as caught:
        text_perplexities([built.directory, other.directory], TEXT)

    (fault,) = caught.value.faults
    assert (fault.where, fault.found) == (str(other.directory), "828 tokens, and other ones from number 4 on")


def test_a_difference_is_one_of_the_same_tokens_in_the_same_windows(built: Built) -> None:
    found = text_perplexity(built.directory, TEXT, window=9, max_tokens=27)

    with pytest.raises(UsageError, match="equal windows"):
        found.difference(text_perplexity(built.directory, TEXT, window=12, max_tokens=27))
    with pytest.raises(UsageError, match="on one text"):
        found.difference(text_perplexity(built.directory, TEXT.upper(), window=9, max_tokens=27))
    with pytest.raises(UsageError, match="on one text"):
        found.difference(text_perplexity(built.directory, TEXT, window=9, max_tokens=29))


def _exchange(path: Path, one: str, other: str) -> None:
    """Exchange the ids of two tokens of a tokenizer."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words[one], words[other] = words[other], words[one]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


@pytest.mark.parametrize("run", [text_perplexity, measure_scales, partial(generate_text, max_tokens=1)])
def test_tokens_that_the_model_lacks_are_refused(tmp_path: Path, run: Callable[[Path, str], object]) -> None:
    built = write_checkpoint(tmp_path / "in", config=tiny_config(vocabulary=60), scheme="int4-g32")
    write_tokenizer(built.directory, 300)

    with pytest.raises(ConfigError, match="below 60"):
        run(built.directory, TEXT)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "in", scheme="int4-g32")

    with pytest.raises(ConfigError, match="tokenizer"):
        text_perplexity(built.directory, TEXT)
