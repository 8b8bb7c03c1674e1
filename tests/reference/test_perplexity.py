"""The perplexity of a text is what transformers' own loss says, window by window."""

from __future__ import annotations

from math import exp
from typing import TYPE_CHECKING

import pytest
import torch
from builders import tiny_config, write_checkpoint

from trtllm_ct.base.errors import ConfigError, UsageError
from trtllm_ct.reference import load_model, text_perplexity
from trtllm_ct.reference.generate import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from builders import Built

pytestmark = pytest.mark.reference

TEXT = "the import statement of a module, the module of an import statement; " * 12


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return write_checkpoint(tmp_path / "in", config=tiny_config(vocabulary=300), scheme="int4-g32", tokenizer=True)


@pytest.mark.parametrize("window", [2, 7, 64, 10_000])
def test_it_is_the_loss_of_each_window(built: Built, window: int) -> None:
    model = load_model(built.directory, dtype=torch.float32)
    token_ids = load_tokenizer(str(built.directory))(TEXT)["input_ids"]
    count = max(1, len(token_ids) // window)
    windows = [token_ids[window * i : window * (i + 1)] for i in range(count)]
    with torch.no_grad():
        losses = [float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in windows]

    found = text_perplexity(model, TEXT, window=window)

    assert found.perplexity == pytest.approx(exp(sum(losses) / count), rel=1e-5)
    assert found.tokens == count * (len(windows[0]) - 1)
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


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "in", scheme="int4-g32")

    with pytest.raises(ConfigError, match="tokenizer"):
        text_perplexity(built.directory, TEXT)
