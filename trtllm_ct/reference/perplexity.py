"""Measure the perplexity of models on a text with the reference engine, and how far their predictions lie apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from math import exp, inf, isfinite, isnan
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.json_form import json_object
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.reference.architecture import require_transformers
from trtllm_ct.reference.directory import detect_model
from trtllm_ct.reference.engine import load_model
from trtllm_ct.reference.generate import load_tokenizer, require_known_tokens, useful_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Perplexity", "text_perplexities", "text_perplexity", "text_windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """The perplexity of a model on a text: exp of the mean negative log-likelihood of a token, in nats.

    `tokens` is the number of tokens that were predicted, in windows of up to `window` tokens that know nothing of each
    other. `windows` are the ids of the tokens that were read, and `likelihoods` the negative log-likelihoods of all but
    the first of each window, float32 [tokens].
    """

    model: str
    tokens: int
    window: int
    seconds: float
    windows: Sequence[Sequence[int]] = field(repr=False, compare=False)
    likelihoods: Tensor = field(repr=False, compare=False)

    @property
    def mean(self) -> float:
        """The mean negative log-likelihood of a token; NaN or infinite if that of a token is."""
        return float(self.likelihoods.double().mean())

    @property
    def perplexity(self) -> float:
        """exp(mean); infinite beyond all numbers of float64, and NaN if the mean is."""
        try:
            return exp(self.mean)
        except OverflowError:
            return inf

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with a perplexity that is no finite number, with the name of the model."""
        perplexity = self.perplexity
        if isfinite(perplexity):
            return ()
        if isnan(perplexity):
            count = int(self.likelihoods.isnan().sum())
            reason = f"not a number, since {count} of {self.tokens} likelihoods are none"
        else:
            reason = f"infinite: the mean of its negative log-likelihoods is {self.mean:.4g}"
        advice = "`trtllm-ct verify` names weights that are NaN or infinite"
        return (f"the perplexity of {self.model} is {reason}; the model is damaged, and {advice}",)

    def difference(self, other: Perplexity) -> float:
        """Return the mean absolute difference of the log-likelihoods of each token; NaN if one of them is.

        Raises `UsageError` for models that read different tokens, or windows.
        """
        _require_same_tokens(other.model, other.windows, self.model, self.windows)
        return float((self.likelihoods.double() - other.likelihoods.double()).abs().mean())

    def to_dict(self, first: Perplexity | None = None) -> dict[str, Any]:
        """Return the JSON form, without the single likelihoods; numbers that are not finite are None.

        With `first`, it has the `difference` to that.
        """
        numbers = {"perplexity": self.perplexity, "mean": self.mean}
        if first is not None:
            numbers["difference"] = self.difference(first)
        return json_object(
            {
                "model": self.model,
                **{name: number if isfinite(number) else None for name, number in numbers.items()},
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

    The text is cut into windows of `window` tokens, the last of which may be shorter; the first token of each is not
    predicted, so a last token that is alone in its window is left out. `max_tokens` are the tokens that are read at
    most. For a model, `dtype` and `quantize_activations` are ignored.
    Raises what `load_model` and `load_tokenizer` raise, `UsageError` for a text of fewer than two tokens, and
    `ConfigError` for a tokenizer with tokens that the model lacks.
    """
    require_transformers()
    if isinstance(directory_or_model, nn.Module):
        model: Any = directory_or_model
    else:
        model = load_model(directory_or_model, dtype=dtype, quantize_activations=quantize_activations)
    return _perplexity(model, text_windows(model.name_or_path, text, window=window, max_tokens=max_tokens))


@missing_packages_as_errors()
def text_perplexities(
    directories: Sequence[str | Path],
    text: str,
    *,
    window: int = 1024,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    quantize_activations: bool = True,
) -> tuple[Perplexity, ...]:
    """Return the perplexities of several checkpoints on a text, one after another; see `text_perplexity`.

    Raises what that raises, and `UsageError` for checkpoints whose tokenizers read other tokens: before a model runs.
    """
    require_transformers()
    read = []
    for directory in directories:
        detect_model(Path(directory))  # what is no model has no tokenizer either
        read.append(text_windows(str(directory), text, window=window, max_tokens=max_tokens))
        _require_same_tokens(str(directories[0]), read[0], str(directory), read[-1])
    return tuple(
        _perplexity(load_model(directory, dtype=dtype, quantize_activations=quantize_activations), windows)
        for directory, windows in zip(directories, read, strict=True)
    )


def text_windows(directory: str, text: str, *, window: int, max_tokens: int | None) -> list[list[int]]:
    """Return the tokens of a text in windows of equal length; the last one may be shorter, but has two tokens or more.

    The tokenizer is that of `directory`; the arguments are those of `text_perplexity`, which see for errors.
    """
    if window < 2:
        raise _usage_error("window", "at least 2 tokens", str(window), "Read at least two tokens together.")
    if max_tokens is not None and max_tokens < 2:
        raise _usage_error("max_tokens", "at least 2 tokens", str(max_tokens), "Read two tokens of the text or more.")
    token_ids = load_tokenizer(directory)(text)["input_ids"][:max_tokens]
    if len(token_ids) < 2:
        remedy = "Give a text of at least two tokens; thousands of them say more."
        raise _usage_error("text", "at least two tokens", f"{len(token_ids)} of them", remedy)
    windows = [token_ids[start : start + window] for start in range(0, len(token_ids), window)]
    return windows if len(windows[-1]) > 1 else windows[:-1]


def _perplexity(model: Any, windows: Sequence[Sequence[int]]) -> Perplexity:
    """Return the perplexity of a model on the tokens of a text."""
    require_known_tokens(model, chain.from_iterable(windows))
    started = perf_counter()
    with useful_threads(model):
        likelihoods = torch.cat([_likelihoods(model, tokens) for tokens in windows])
    return Perplexity(
        model=str(model.name_or_path),
        tokens=len(likelihoods),
        window=len(windows[0]),
        seconds=perf_counter() - started,
        windows=windows,
        likelihoods=likelihoods,
    )


@torch.inference_mode()
def _likelihoods(model: Any, token_ids: Sequence[int]) -> Tensor:
    """Return the negative log-likelihood of each token but the first, float32 [tokens - 1]."""
    tokens = torch.tensor([token_ids])
    logits = model(input_ids=tokens).logits[0].float()
    return nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")


def _require_same_tokens(
    first: str, wanted: Sequence[Sequence[int]], model: str, windows: Sequence[Sequence[int]]
) -> None:
    """Raise `UsageError` unless a model reads the tokens and the windows that the first one reads."""
    if windows == wanted:
        return
    tokens, others = list(chain.from_iterable(windows)), list(chain.from_iterable(wanted))
    if tokens == others:
        expected = f"windows of {len(wanted[0])} tokens, as {first} reads"
        raise _usage_error(model, expected, f"windows of {len(windows[0])}", "Read the text in equal windows.")
    same = next((at for at, (one, other) in enumerate(zip(tokens, others)) if one != other), None)  # noqa: B905
    found = f"{len(tokens)} tokens" if same is None else f"{len(tokens)} tokens, and other ones from number {same} on"
    remedy = "Compare models with one tokenizer, on one text."
    raise _usage_error(model, f"the {len(others)} tokens that {first} reads", found, remedy)


def _usage_error(where: str, expected: str, found: str, remedy: str) -> UsageError:
    return UsageError(Fault(where=where, expected=expected, found=found, remedy=remedy))
