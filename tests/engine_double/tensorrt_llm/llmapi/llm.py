"""Imitates `llmapi/llm.py`, `executor/result.py` and `sampling_params.py`: LLM and its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensorrt_llm.executor.worker import Executor
from tensorrt_llm.inputs.registry import create_input_processor
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
from tensorrt_llm.llmapi.llm_utils import CachedModelLoader

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from typing_extensions import Self

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams"]


@dataclass(kw_only=True)
class SamplingParams:
    """Greedy unless a temperature is given, which the double doesn't imitate."""

    max_tokens: int = 32
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    end_id: int | None = None
    ignore_eos: bool = False
    stop: str | list[str] | None = None


@dataclass(kw_only=True)
class CompletionOutput:
    """One continuation; `finish_reason` is "stop" or "length"."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass(kw_only=True)
class RequestOutput:
    """A prompt and its one continuation."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """Class `LLM` of the PyTorch backend: arguments, the parent's reading of the directory, then the workers."""

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.args = TorchLlmArgs.from_kwargs(
            model=str(model),
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            **kwargs,
        )
        if self.args.backend == "_autodeploy":
            raise NotImplementedError("the double has no AutoDeploy, which would ignore the checkpoint loader")
        model_dir = CachedModelLoader(self.args)()
        self.tokenizer: Any = None if skip_tokenizer_init else tokenizer or _tokenizer(model_dir)
        self.input_processor = create_input_processor(model_dir, self.tokenizer, self.args.checkpoint_format)
        self._end_ids = _end_ids(model_dir)
        self._executor = Executor(self.args, str(model_dir))

    def generate(
        self,
        inputs: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
    ) -> Any:
        """Return one result for one prompt (a string or token ids), or a list for several prompts."""
        one = isinstance(inputs, str) or (len(inputs) > 0 and isinstance(inputs[0], int))
        prompts: Sequence[Any] = [inputs] if one else inputs
        results = [self._complete(prompt, sampling_params or SamplingParams()) for prompt in prompts]
        return results[0] if one else results

    def logits(self, tokens: Sequence[int], *, draft: bool = False) -> torch.Tensor:
        """For tests: float32 logits [tokens, vocabulary] of the model, or of its draft model."""
        return self._executor.logits([int(token) for token in tokens], draft)

    @property
    def models(self) -> list[Any]:
        """For tests with ranks in this process: the modules of every rank."""
        ranks: list[Any] = self._executor.ranks
        return [rank.worker.model for rank in ranks]

    def shutdown(self) -> None:
        self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _complete(self, prompt: str | Sequence[int], params: SamplingParams) -> RequestOutput:
        if params.temperature and params.top_k != 1:
            raise NotImplementedError("the double samples greedily only")
        text = prompt if isinstance(prompt, str) else None
        ids = [int(token) for token in (self.tokenizer.encode(prompt) if text is not None else prompt)]
        ends = set() if params.ignore_eos else self._end_ids | {params.end_id}
        stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
        new: list[int] = []
        reason, words = "length", ""
        while len(new) < params.max_tokens and reason == "length":
            new.append(int(self.logits(ids + new)[-1].argmax()))
            if new[-1] in ends:
                new.pop()
                reason = "stop"
            words = self.tokenizer.decode(new, skip_special_tokens=True) if self.tokenizer else ""
            found = [words.index(stop) for stop in stops if stop in words]
            if found:
                words, reason = words[: min(found)], "stop"
        output = CompletionOutput(index=0, text=words, token_ids=new, finish_reason=reason)
        return RequestOutput(prompt=text, prompt_token_ids=ids, outputs=[output])


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def _end_ids(directory: Path) -> set[int | None]:
    import json

    ids: Any = None
    for name in ("generation_config.json", "config.json"):
        if ids is None and (directory / name).exists():
            ids = json.loads((directory / name).read_text()).get("eos_token_id")
    return set(ids) if isinstance(ids, list) else {ids}
