"""Text from a directory or model: greedy decoding with the reference engine.

The loop is written out rather than left to transformers' `generate`: it takes the largest logit and nothing else,
whatever sampling settings and penalties lie beside the weights, and it can tell of each token as it comes.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from trtllm_ct.base.errors import ConfigError, Fault, UsageError
from trtllm_ct.reference.architecture import in_one_line, quiet_transformers, require_transformers
from trtllm_ct.reference.engine import load_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = ["Generation", "end_tokens_of", "generate_text", "load_tokenizer", "threads_that_pay", "tokens_after"]

_SMALL_MATRIX = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What was generated after a prompt.

    `token_ids` are the new tokens, an end token included; `text` is what they decode to, without special tokens.
    `finish_reason` is "stop" after an end token, "length" after `max_tokens`. `seconds` count decoding, not loading.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    seconds: float


def generate_text(
    directory_or_model: str | Path | nn.Module,
    prompt: str,
    *,
    max_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    quantize_activations: bool = True,
    on_token: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt` greedily by at most `max_tokens` tokens; nothing is fetched from a network.

    `directory_or_model` is a checkpoint directory, or a model from `load_model`, which remembers its directory; `dtype`
    and `quantize_activations` are then the model's own. The tokenizer is the directory's.
    `on_token` is called after each token with the text that it completes; joined, the pieces are the whole text.
    Raises what `load_model` raises, `UsageError` for a prompt without tokens, `ConfigError` without a tokenizer.
    """
    require_transformers()
    if max_tokens < 1:
        raise _usage_error("max_tokens", "at least 1", str(max_tokens), "Ask for one token or more.")
    if isinstance(directory_or_model, nn.Module):
        model: Any = directory_or_model
    else:
        model = load_model(directory_or_model, dtype=dtype, quantize_activations=quantize_activations)
    tokenizer = load_tokenizer(model.name_or_path)
    prompt_ids: list[int] = tokenizer(prompt)["input_ids"]
    if not prompt_ids:
        raise _usage_error("prompt", "text of one token or more", repr(prompt), "Give some text to continue.")
    started = perf_counter()
    end_tokens = end_tokens_of(model)
    token_ids: list[int] = []
    text = ""
    with threads_that_pay(model):
        for token_id in islice(tokens_after(model, prompt_ids, _largest), max_tokens):
            token_ids.append(token_id)
            complete = _decode(tokenizer, token_ids, final=token_id in end_tokens or len(token_ids) == max_tokens)
            if on_token is not None:
                on_token(complete[len(text) :])
            text = complete
            if token_id in end_tokens:
                break
    return Generation(
        prompt=prompt,
        text=text,
        token_ids=tuple(token_ids),
        finish_reason="stop" if token_ids[-1] in end_tokens else "length",
        seconds=perf_counter() - started,
    )


@torch.inference_mode()
def tokens_after(model: Any, prompt_ids: list[int], choose: Callable[[Tensor], int]) -> Iterator[int]:
    """Tokens without end; `choose` takes each from the logits [vocabulary] of the last position.

    After the prompt, each step reads one token and the cache.
    """
    step, cache = prompt_ids, None
    while True:
        output = model(input_ids=torch.tensor([step]), past_key_values=cache, use_cache=True)
        token_id = choose(output.logits[0, -1])
        yield token_id
        step, cache = [token_id], output.past_key_values


def _largest(logits: Tensor) -> int:
    return int(logits.argmax())


@contextmanager
def threads_that_pay(model: nn.Module) -> Iterator[None]:
    """One thread for a model of small matrices, and the caller's number again afterwards.

    Threads meet after every operation. Where an operation takes microseconds and other programs use the cores, waiting
    for each other takes ten times as long as computing.
    """
    threads = torch.get_num_threads()
    if max((tensor.numel() for tensor in model.state_dict().values()), default=0) < _SMALL_MATRIX:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def end_tokens_of(model: Any) -> frozenset[int]:
    """The tokens after which the model has nothing more to say, by its generation config."""
    stated = model.generation_config.eos_token_id
    if stated is None:
        return frozenset()
    return frozenset([stated] if isinstance(stated, int) else stated)


def _decode(tokenizer: Any, token_ids: list[int], *, final: bool) -> str:
    """The text of the tokens; unless it is final, without a character whose bytes are not all there."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text if final else text.rstrip("\ufffd")


def load_tokenizer(directory: str) -> Any:
    """The tokenizer of a checkpoint directory; raises `UsageError` without a directory, `ConfigError` without one."""
    from transformers import AutoTokenizer

    if not directory or not Path(directory).is_dir():
        found = f"one of name_or_path {directory!r}"
        raise _usage_error("model", "one that load_model made", found, "Give the checkpoint directory instead.")
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            Fault(
                where=directory,
                expected="a tokenizer that transformers can load",
                found=in_one_line(error),
                remedy="Put tokenizer.json and tokenizer_config.json beside the weights.",
            )
        ) from error


def _usage_error(where: str, expected: str, found: str, remedy: str) -> UsageError:
    return UsageError(Fault(where=where, expected=expected, found=found, remedy=remedy))
