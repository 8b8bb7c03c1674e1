"""`ReferenceLLM`: the reference engine behind the surface of TensorRT-LLM's `LLM`, for machines without a GPU.

Prompts run one after another, each from its own seed, so that a result doesn't depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.reference.directory import model_dtype
from trtllm_ct.reference.engine import load_model
from trtllm_ct.reference.generate import end_tokens_of, load_tokenizer, threads_that_pay, tokens_after
from trtllm_ct.reference.requests import CompletionOutput, RequestOutput, SamplingParams
from trtllm_ct.reference.sampling import Sampler

__all__ = ["ReferenceLLM"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class ReferenceLLM:
    """A model on the CPU with `generate`, as `tensorrt_llm.LLM` has it.

    `model` is a compressed-tensors, ModelOpt or unquantized directory. `dtype` is what modules dequantize and compute
    in, the checkpoint's own for "auto". `tokenizer` is an object that replaces the directory's, or a directory;
    `skip_tokenizer_init` goes without one, for prompts of token ids.
    Raises what `load_model` raises, and `ConfigError` without a tokenizer.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: Any = None,
        skip_tokenizer_init: bool = False,
        dtype: str | torch.dtype = "auto",
    ) -> None:
        self._model: Any = load_model(model, dtype=_compute_dtype(model, dtype))
        self.tokenizer: Any = None
        if not skip_tokenizer_init:
            given = tokenizer is not None and not isinstance(tokenizer, (str, PathLike))
            self.tokenizer = tokenizer if given else load_tokenizer(str(tokenizer or model))

    def generate(
        self,
        inputs: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: object = None,
        *,
        use_tqdm: bool = True,  # noqa: ARG002 (the engine's keyword; there is no bar here)
    ) -> Any:
        """Continue prompts: a `RequestOutput` for one (a string, or token ids), a list of them for a list of prompts.

        `sampling_params` are for all prompts, or a list with one entry a prompt.
        Raises `UsageError` for a prompt without tokens, and for stop strings without a tokenizer.
        """
        one = isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], int))
        prompts: Sequence[Any] = [inputs] if one else inputs
        one_each = isinstance(sampling_params, Sequence)
        given: Sequence[object] = sampling_params if one_each else [sampling_params] * len(prompts)  # type: ignore[assignment]
        if len(given) != len(prompts):
            raise _usage_error("sampling_params", f"{len(prompts)}, one a prompt", str(len(given)))
        params = [SamplingParams.of(each) for each in given]
        with threads_that_pay(self._model):
            results = [self._complete(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
        return results[0] if one else results

    def shutdown(self) -> None:
        """Let go of the model; `generate` can't be called any more."""
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _complete(self, prompt: str | Sequence[int], params: SamplingParams) -> RequestOutput:
        if params.stops and self.tokenizer is None:
            raise _usage_error("SamplingParams.stop", "a tokenizer to see the strings with", "skip_tokenizer_init")
        prompt_ids = self._prompt_ids(prompt)
        output = self._continue(prompt_ids, params)
        words = prompt if isinstance(prompt, str) else None
        return RequestOutput(prompt=words, prompt_token_ids=prompt_ids, outputs=[output])

    def _continue(self, prompt_ids: list[int], params: SamplingParams) -> CompletionOutput:
        end_tokens = end_tokens_of(self._model)
        token_ids: list[int] = []
        text = ""
        for token_id in islice(tokens_after(self._model, prompt_ids, Sampler(params)), params.max_tokens):
            token_ids.append(token_id)
            text = self._decode(token_ids)
            stop = min((stop for stop in params.stops if stop in text), key=text.index, default=None)
            if stop is not None:
                return self._before(stop, text, token_ids)
            if token_id in end_tokens:
                return CompletionOutput(index=0, text=text, token_ids=token_ids, finish_reason="stop")
        return CompletionOutput(index=0, text=text, token_ids=token_ids, finish_reason="length")

    def _before(self, stop: str, text: str, token_ids: list[int]) -> CompletionOutput:
        """The part of a text that ends before a stop string; a token that holds both goes with the string."""
        end = text.index(stop)
        kept = next(n for n in range(len(token_ids), -1, -1) if len(self._decode(token_ids[:n])) <= end)
        return CompletionOutput(
            index=0, text=text[:end], token_ids=token_ids[:kept], finish_reason="stop", stop_reason=stop
        )

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str) and self.tokenizer is None:
            raise _usage_error("prompt", "token ids, as there is no tokenizer", repr(prompt))
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        size = self._model.config.vocab_size
        if not ids or not all(isinstance(token, int) and 0 <= token < size for token in ids):
            raise _usage_error("prompt", f"text, or token ids below {size}, one or more", repr(prompt))
        return list(ids)

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True) if self.tokenizer is not None else ""
        return text


def _compute_dtype(model: str | Path, dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return model_dtype(Path(model))
    if dtype not in _DTYPES:
        raise _usage_error("dtype", f"auto or {' or '.join(_DTYPES)}", repr(dtype))
    return _DTYPES[dtype]


def _usage_error(where: str, expected: str, found: str) -> UsageError:
    return UsageError(Fault(where=where, expected=expected, found=found, remedy="Give what is expected."))
