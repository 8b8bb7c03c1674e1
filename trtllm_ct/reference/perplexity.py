"""Measure the perplexity of models on a text with the reference engine, and how far their predictions lie apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.json_form import json_object
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.reference.architecture import require_transformers
from trtllm_ct.reference.engine import load_model
from trtllm_ct.reference.generate import load_tokenizer, useful_threads

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["Perplexity", "text_perplexity", "text_windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """The perplexity of a model on a text: exp of the mean negative log-likelihood of a token, in nats.

    `tokens` is the number of tokens that were predicted, in windows of `window` tokens that know nothing of each other.
    `likelihoods` are the negative log-likelihoods, float32 [tokens].
    """

    model: str
    tokens: int
    window: int
    seconds: float
    likelihoods: Tensor = field(repr=False, compare=False)

    @property
    def mean(self) -> float:
        """The mean negative log-likelihood of a token."""
        return float(self.likelihoods.double().mean())

    @property
    def perplexity(self) -> float:
        """exp(mean)."""
        return exp(self.mean)

    def difference(self, other: Perplexity) -> float:
        """Return the mean absolute difference of the log-likelihoods of each token.

        Raises `UsageError` for models that read different numbers of tokens.
        """
        if self.tokens != other.tokens:
            raise _usage_error(self.model, f"{other.tokens} tokens, as {other.model} reads", f"{self.tokens} tokens")
        return float((self.likelihoods.double() - other.likelihoods.double()).abs().mean())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the single likelihoods."""
        return json_object(
            {
                "model": self.model,
                "perplexity": self.perplexity,
                "mean": self.mean,
                "tokens": self.tokens,
                "window": self.window,
                "seconds": self.seconds,
            }
        )


@missing_packages_as_errors()
def text_perplexity(
    directory_or_model: str | Path | nn.Module,
    text: str,
    *,
    window: int = 1024,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    quantize_activations: bool = True,
) -> Perplexity:
    """Return the perplexity of a checkpoint, or of a model from `load_model`, on a text; nothing is downloaded.

    The text is cut into windows of `window` tokens; the first token of each is not predicted, and a last window of
    fewer tokens is left out unless it is the only one. `max_tokens` are the tokens that are read at most.
    For a model, `dtype` and `quantize_activations` are ignored.
    Raises what `load_model` and `load_tokenizer` raise, and `UsageError` for a text of fewer than two tokens.
    """
    require_transformers()
    if isinstance(directory_or_model, nn.Module):
        model: Any = directory_or_model
    else:
        model = load_model(directory_or_model, dtype=dtype, quantize_activations=quantize_activations)
    windows = text_windows(model.name_or_path, text, window=window, max_tokens=max_tokens)
    started = perf_counter()
    with useful_threads(model):
        likelihoods = torch.cat([_likelihoods(model, tokens) for tokens in windows])
    return Perplexity(
        model=str(model.name_or_path),
        tokens=len(likelihoods),
        window=len(windows[0]),
        seconds=perf_counter() - started,
        likelihoods=likelihoods,
    )


def text_windows(directory: str, text: str, *, window: int, max_tokens: int | None) -> list[list[int]]:
    """Return the tokens of a text in windows of equal length; a shorter one only if the text has no more tokens.

    The tokenizer is that of `directory`; the arguments are those of `text_perplexity`, which see for errors.
    """
    if window < 2:
        raise _usage_error("window", "at least 2 tokens", str(window))
    token_ids = load_tokenizer(directory)(text)["input_ids"][:max_tokens]
    if len(token_ids) < 2:
        raise _usage_error("text", "at least two tokens", f"{len(token_ids)} of them")
    whole = len(token_ids) // window * window
    return [token_ids[start : start + window] for start in range(0, whole, window)] or [token_ids]


@torch.inference_mode()
def _likelihoods(model: Any, token_ids: list[int]) -> Tensor:
    """Return the negative log-likelihood of each token but the first, float32 [tokens - 1]."""
    tokens = torch.tensor([token_ids])
    logits = model(input_ids=tokens).logits[0].float()
    return nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")


def _usage_error(where: str, expected: str, found: str) -> UsageError:
    remedy = "Give more text, or larger windows, and compare models with one tokenizer."
    return UsageError(Fault(where=where, expected=expected, found=found, remedy=remedy))
