"""Generate text from a directory or model with the reference engine.

The decoding loop does not use transformers' `generate`. It takes the largest logit, or samples with a temperature and a
seed, whatever sampling settings and penalties the checkpoint has, and it can report each token as soon as it is
generated.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from trtllm_ct.base.errors import CatalogError, ConfigError, Fault, FaultCollector, UsageError
from trtllm_ct.base.json_form import fields_form
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.base.regular_files import SIDE_FILE_BYTES, open_regular
from trtllm_ct.reference.architecture import in_one_line, quiet_transformers, require_transformers
from trtllm_ct.reference.engine import load_model
from trtllm_ct.reference.prompts import has_chat_template, prompt_tokens
from trtllm_ct.reference.requests import SamplingParams
from trtllm_ct.reference.sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

__all__ = [
    "Generation",
    "end_tokens_of",
    "generate_text",
    "generate_tokens",
    "load_tokenizer",
    "require_known_tokens",
    "useful_threads",
]

# A model without a tensor of at least this many elements runs on one thread.
_MIN_ELEMENTS_FOR_THREADS = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The text that was generated after a prompt.

    `token_ids` are the new tokens, including the end token if there is one. `text` is the decoded text without special
    tokens. `finish_reason` is "stop" after an end token, "length" after `max_tokens`. `seconds` is the time of
    decoding, without loading. `chat` says whether the prompt was put into the tokenizer's chat template.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    seconds: float
    chat: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return fields_form(self)


@missing_packages_as_errors()
def generate_text(
    directory_or_model: str | Path | nn.Module,
    prompt: str,
    *,
    max_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    quantize_activations: bool = True,
    on_token: Callable[[str], None] | None = None,
    chat: bool = False,
    temperature: float | None = None,
    seed: int | None = None,
) -> Generation:
    """Continue `prompt` by at most `max_tokens` tokens; nothing is downloaded.

    Decoding is greedy. With a `temperature` above 0 tokens are sampled: logits are divided by it, and the same `seed`
    gives the same tokens; None is 0. With `chat`, a prompt is put into the tokenizer's chat template, if it has one, as
    a message of the user.

    `directory_or_model` is a checkpoint directory, or a model from `load_model`, which remembers its directory. For a
    model, `dtype` and `quantize_activations` are ignored. The tokenizer is loaded from the directory.
    `on_token` is called after each token with the text that the token completes; concatenated, these pieces are the
    whole text.
    Raises what `load_model` raises, `UsageError` for a prompt without tokens and for values that `SamplingParams`
    refuses, `ConfigError` without a tokenizer, with one that has tokens that the model lacks, or with a template that
    can't be applied, and `PayloadError` for a logit that is NaN.
    """
    require_transformers()
    if max_tokens < 1:
        raise _usage_error("max_tokens", "at least 1", str(max_tokens), "Ask for one token or more.")
    choose = Sampler(SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed))
    if isinstance(directory_or_model, nn.Module):
        model: Any = directory_or_model
    else:
        model = load_model(directory_or_model, dtype=dtype, quantize_activations=quantize_activations)
    tokenizer = load_tokenizer(model.name_or_path)
    chat = chat and has_chat_template(tokenizer)
    prompt_ids = prompt_tokens(tokenizer, prompt, chat=chat)
    require_known_tokens(model, prompt_ids)
    started = perf_counter()
    end_tokens = end_tokens_of(model)
    token_ids: list[int] = []
    text = ""
    with useful_threads(model):
        for token_id in islice(generate_tokens(model, prompt_ids, choose), max_tokens):
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
        chat=chat,
    )


@torch.inference_mode()
def generate_tokens(model: Any, prompt_ids: list[int], choose: Callable[[Tensor], int]) -> Iterator[int]:
    """Yield new tokens without end; `choose` picks each from the logits [vocabulary] of the last position.

    The first step runs the whole prompt; each further step runs one token with the KV cache.
    """
    step, cache = prompt_ids, None
    argument = _cache_argument(model)
    while True:
        output = model(input_ids=torch.tensor([step]), use_cache=True, **{argument: cache})
        token_id = choose(output.logits[0, -1])
        yield token_id
        step, cache = [token_id], output[argument]


def _cache_argument(model: Any) -> str:
    """The name of the KV cache in the model's arguments and in its output: `cache` since transformers 5.24."""
    parameters = inspect.signature(inspect.unwrap(model.forward)).parameters
    return "cache" if "cache" in parameters else "past_key_values"


@contextmanager
def useful_threads(model: nn.Module) -> Iterator[None]:
    """Run a model of small matrices on one thread, and restore the number of threads afterwards.

    Threads synchronize after every operation. Where an operation takes microseconds and other programs use the cores,
    synchronization takes ten times as long as the computation.
    """
    threads = torch.get_num_threads()
    if max((tensor.numel() for tensor in model.state_dict().values()), default=0) < _MIN_ELEMENTS_FOR_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def end_tokens_of(model: Any) -> frozenset[int]:
    """The ids of the tokens that end a text, from the model's generation config; empty if it names none."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _decode(tokenizer: Any, token_ids: list[int], *, final: bool) -> str:
    """Decode the tokens to text without special tokens.

    Unless `final`, a last character whose bytes are still incomplete is removed.
    """
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text if final else text.rstrip("\ufffd")


_TOKENIZER_FILES = (".json", ".jinja", ".model", ".txt")


def _require_regular_files(directory: Path) -> None:
    """Raise `CatalogError` for files of a tokenizer that are no regular files or can't be read.

    transformers opens them by name, and would wait for a named pipe forever. Links are followed.
    """
    faults = FaultCollector()
    for path in sorted(directory.iterdir()):
        if path.suffix in _TOKENIZER_FILES:
            try:
                with open_regular(path, SIDE_FILE_BYTES):
                    pass
            except OSError as error:
                remedy = "Put the file itself there if you know what it is, otherwise delete it."
                found = f"{error.strerror or error}".lower()
                faults.add(where=str(path), expected="a file of the checkpoint", found=found, remedy=remedy)
    faults.raise_if_any(CatalogError)


def load_tokenizer(directory: str) -> Any:
    """Load the tokenizer of a checkpoint directory.

    Raises `UsageError` when there is no such directory, `ConfigError` when it holds no tokenizer that can be loaded,
    and `CatalogError` for files of one that are no regular files.
    """
    from transformers import AutoTokenizer

    if not directory or not Path(directory).is_dir():
        found = f"one with name_or_path {directory!r}"
        raise _usage_error("model", "one that load_model made", found, "Give the checkpoint directory instead.")
    _require_regular_files(Path(directory))
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    # transformers 4 tries older kinds of tokenizers before it gives up, and fails in the libraries that these need.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            Fault(
                where=directory,
                expected="a tokenizer that transformers can load",
                found=in_one_line(error),
                remedy="Put tokenizer.json and tokenizer_config.json beside the weights.",
            )
        ) from error


def require_known_tokens(model: Any, token_ids: Iterable[int]) -> None:
    """Raise `ConfigError` if the tokenizer of a model made tokens that the model has no embedding for."""
    size = model.config.vocab_size
    largest = max(token_ids, default=0)
    if largest >= size:
        raise ConfigError(
            Fault(
                where=str(model.name_or_path),
                expected=f"a tokenizer with tokens that the model has, below {size}",
                found=f"token {largest}",
                remedy="Put the tokenizer of this model beside its weights.",
            )
        )


def _usage_error(where: str, expected: str, found: str, remedy: str) -> UsageError:
    return UsageError(Fault(where=where, expected=expected, found=found, remedy=remedy))
