"""`ReferenceLLM`: the reference engine with the interface of TensorRT-LLM's `LLM`, for machines without a GPU.

Prompts run one after another, each with its own random generator, so the result of a prompt doesn't depend on the other
prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.reference.directory import model_dtype
from trtllm_ct.reference.engine import load_model
from trtllm_ct.reference.generate import end_tokens_of, generate_tokens, load_tokenizer, useful_threads
from trtllm_ct.reference.requests import CompletionOutput, Prompt, RequestOutput, SamplingParams
from trtllm_ct.reference.sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

__all__ = ["ReferenceLLM"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class ReferenceLLM:
    """A model on the CPU with the `generate` method of `tensorrt_llm.LLM`.

    `model` is a compressed-tensors, ModelOpt or unquantized directory. Modules dequantize and compute in `dtype`;
    "auto" is the dtype of the checkpoint. `tokenizer` is a tokenizer object, or a directory to load the tokenizer from;
    with None it is loaded from `model`. `skip_tokenizer_init` loads no tokenizer: prompts must then be token ids.
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
            is_object = tokenizer is not None and not isinstance(tokenizer, (str, PathLike))
            self.tokenizer = tokenizer if is_object else load_tokenizer(str(tokenizer or model))

    def generate(
        self,
        inputs: str | Sequence[int] | Mapping[str, Any] | Sequence[str | Sequence[int] | Mapping[str, Any]],
        sampling_params: object = None,
        *,
        use_tqdm: bool = True,  # noqa: ARG002 (the engine's keyword; no progress bar here)
    ) -> Any:
        """Continue one prompt or a list of prompts.

        A prompt is a string, a sequence of token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
        Returns a `RequestOutput` for one prompt, a list of them for a list of prompts.
        `sampling_params` applies to all prompts, or is a list with one entry per prompt.
        Raises `UsageError` for a prompt without tokens or of another form, and for stop strings without a tokenizer.
        """
        is_many = isinstance(inputs, list | tuple) and not (inputs and isinstance(inputs[0], int))
        prompts = [Prompt.of(form) for form in (inputs if is_many else [inputs])]
        one_per_prompt = isinstance(sampling_params, Sequence)
        entries: Sequence[object] = sampling_params if one_per_prompt else [sampling_params] * len(prompts)  # type: ignore[assignment]
        if len(entries) != len(prompts):
            raise _usage_error("sampling_params", f"{len(prompts)}, one a prompt", str(len(entries)))
        all_params = [SamplingParams.of(entry) for entry in entries]
        with useful_threads(self._model):
            results = [self._complete(prompt, params) for prompt, params in zip(prompts, all_params, strict=True)]
        return results if is_many else results[0]

    def shutdown(self) -> None:
        """Release the model; `generate` can't be called any more."""
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _complete(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        if params.stops and self.tokenizer is None:
            raise _usage_error("SamplingParams.stop", "a tokenizer, which stop strings need", "skip_tokenizer_init")
        prompt_ids = self._prompt_ids(prompt)
        output = self._continue(prompt_ids, params)
        return RequestOutput(prompt=prompt.text, prompt_token_ids=prompt_ids, outputs=[output])

    def _continue(self, prompt_ids: list[int], params: SamplingParams) -> CompletionOutput:
        end_tokens = end_tokens_of(self._model)
        token_ids: list[int] = []
        text = ""
        for token_id in islice(generate_tokens(self._model, prompt_ids, Sampler(params)), params.max_tokens):
            token_ids.append(token_id)
            text = self._decode(token_ids)
            stop = min((stop for stop in params.stops if stop in text), key=text.index, default=None)
            if stop is not None:
                return self._cut_at_stop(stop, text, token_ids)
            if token_id in end_tokens:
                return CompletionOutput(index=0, text=text, token_ids=token_ids, finish_reason="stop")
        return CompletionOutput(index=0, text=text, token_ids=token_ids, finish_reason="length")

    def _cut_at_stop(self, stop: str, text: str, token_ids: list[int]) -> CompletionOutput:
        """Cut text and tokens before the stop string; a token that overlaps the stop string is dropped."""
        end = text.index(stop)
        count = next(n for n in range(len(token_ids), -1, -1) if len(self._decode(token_ids[:n])) <= end)
        return CompletionOutput(
            index=0, text=text[:end], token_ids=token_ids[:count], finish_reason="stop", stop_reason=stop
        )

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        ids = prompt.token_ids
        if ids is None and self.tokenizer is None:
            raise _usage_error("prompt", "token ids, as there is no tokenizer", repr(prompt.text))
        ids = self.tokenizer(prompt.text)["input_ids"] if ids is None else ids
        size = self._model.config.vocab_size
        if not ids or not all(0 <= token < size for token in ids):
            found = repr(prompt.text if prompt.token_ids is None else prompt.token_ids)
            raise _usage_error("prompt", f"text, or token ids below {size}, one or more", found)
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
