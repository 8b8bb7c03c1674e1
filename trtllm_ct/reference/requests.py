"""The prompts, parameters and results of `ReferenceLLM`; this module does not import torch.

Names and meanings are the same as in TensorRT-LLM's LLM API, so that a program runs on either engine.
Source: TensorRT-LLM `sampling_params.py`, `inputs/data.py` and `executor/result.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from math import inf
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trtllm_ct.base.errors import Fault, FaultCollector, UsageError

if TYPE_CHECKING:
    from typing import TypeGuard

    from typing_extensions import Self

__all__ = ["CompletionOutput", "Prompt", "RequestOutput", "SamplingParams"]

_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids"})

_SEED_COUNT = 2**64

T = TypeVar("T")


def _names_checked(kind: type[T]) -> type[T]:
    """Let a dataclass raise `UsageError` for fields that it lacks, such as those of TensorRT-LLM's own class."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    changed: Any = kind
    make = changed.__init__

    @wraps(make)
    def checked(self: T, *unnamed: object, **given: object) -> None:
        faults = FaultCollector()
        expected = f"the parameters of the reference engine, by name: {', '.join(names)}"
        remedy = "Leave it out, or run with TensorRT-LLM, which has more."
        for name in given.keys() - names:
            faults.add(where=f"{kind.__name__}.{name}", expected=expected, found=repr(given[name]), remedy=remedy)
        if unnamed:
            faults.add(where=kind.__name__, expected=expected, found=repr(unnamed[0]), remedy="Give its name too.")
        faults.raise_if_any(UsageError)
        make(self, **given)

    changed.__init__ = checked
    return kind


@_names_checked
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens after a prompt are chosen, and when to stop.

    `max_tokens` is the largest number of tokens to generate. Decoding is greedy (the largest logit wins) when
    `temperature`, `top_p` and `top_k` are all None, and for `temperature=0`, `top_k=1` and `top_p=0`. Otherwise tokens
    are sampled: logits are divided by `temperature` (1 if None); `top_k` keeps the k most likely tokens (0 and None
    keep all); of these, `top_p` keeps the smallest number of most likely tokens whose probabilities add up to at
    least `top_p`. The same `seed` gives the same tokens; None is 0.
    `stop` is one string or several: the text ends before the one that occurs first.
    Raises `UsageError` that lists every value out of its range, or every parameter that there is not.
    """

    max_tokens: int = 32
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        ranges = (
            ("max_tokens", int, 1, inf, "an integer of at least 1"),
            ("temperature", float, 0, inf, "a number of at least 0"),
            ("top_p", float, 0, 1, "a number between 0 and 1"),
            ("top_k", int, 0, inf, "an integer of at least 0"),
            ("seed", int, 0, _SEED_COUNT - 1, "an integer between 0 and 2^64 - 1"),
        )
        faults = FaultCollector()
        for name, number_type, low, high, expected in ranges:
            value = getattr(self, name)
            is_default = value is None and name != "max_tokens"
            if not is_default and not _is_in_range(value, number_type, low, high):
                remedy = "Leave it out for the default, or give a value in this range."
                faults.add(where=f"SamplingParams.{name}", expected=expected, found=repr(value), remedy=remedy)
        if not all(isinstance(stop, str) and stop for stop in self.stops):
            remedy = "Every text contains the empty string; give strings that can be waited for."
            faults.add(where="SamplingParams.stop", expected="strings", found=repr(self.stop), remedy=remedy)
        faults.raise_if_any(UsageError)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always chosen, without sampling."""
        settings = (self.temperature, self.top_p, self.top_k)
        return settings == (None, None, None) or self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple; empty if there are none."""
        stop: Any = () if self.stop is None else self.stop
        return (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)

    @classmethod
    def of(cls, params: object) -> Self:
        """Convert `params` to this class.

        An instance of this class is returned as it is. None gives the defaults. An instance of TensorRT-LLM's own
        `SamplingParams` is read field by field.
        Raises `UsageError` for any other object, and for each field that the reference engine lacks and whose value is
        not the default.
        """
        if params is None:
            return cls()
        if isinstance(params, cls):
            return params
        faults = FaultCollector()
        names = {field.name for field in fields(cls)}
        if not is_dataclass(params) or isinstance(params, type):
            remedy = "Make one with trtllm_ct.SamplingParams(max_tokens=...)."
            faults.add(where="sampling_params", expected="SamplingParams", found=repr(params), remedy=remedy)
            faults.raise_if_any(UsageError)
        for name, value in _changed_fields(params).items():
            if name not in names:
                faults.add(
                    where=f"SamplingParams.{name}",
                    expected="its default: the reference engine doesn't have it",
                    found=repr(value),
                    remedy="Leave it out, or run with engine='tensorrt_llm'.",
                )
        faults.raise_if_any(UsageError)
        return cls(**{name: getattr(params, name) for name in names if hasattr(params, name)})


def _is_in_range(value: object, number_type: type, low: float, high: float) -> bool:
    """Whether `value` is a finite number of the type from `low` to `high`; an int is also accepted as a float."""
    is_number = isinstance(value, (int, float) if number_type is float else int) and not isinstance(value, bool)
    return is_number and low <= value <= high and value != inf  # type: ignore[operator]


def _changed_fields(params: Any) -> dict[str, Any]:
    """The public fields of a dataclass instance that differ from those of an instance made without arguments.

    Values are compared with an instance because TensorRT-LLM's class sets some of its fields from others when created.
    """
    default = type(params)()
    public = [field.name for field in fields(params) if not field.name.startswith("_")]
    values = {name: getattr(params, name) for name in public}
    return {name: value for name, value in values.items() if not _is_same(value, getattr(default, name))}


def _is_same(left: object, right: object) -> bool:
    return left is right or (type(left) is type(right) and left == right)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt: its text, its token ids, or both; the ids are what is continued, and follow from the text alone.

    TensorRT-LLM's LLM takes the same forms (`PromptInputs`).
    """

    text: str | None = None
    token_ids: Sequence[int] | None = None

    @classmethod
    def of(cls, form: object) -> Self:
        """Read a text, a sequence of token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.

        Raises `UsageError` for anything else, also for images and whatever else a prompt may have in TensorRT-LLM.
        """
        if isinstance(form, str):
            return cls(text=form)
        if _is_token_ids(form):
            return cls(token_ids=form)
        if isinstance(form, Mapping) and form.keys() <= _PROMPT_KEYS:
            text, ids = form.get("prompt"), form.get("prompt_token_ids")
            if (text, ids) != (None, None) and isinstance(text, str | None) and (ids is None or _is_token_ids(ids)):
                return cls(text=text, token_ids=ids)
        raise UsageError(
            Fault(
                where="prompt",
                expected="a text, token ids, or a dictionary with prompt or prompt_token_ids alone",
                found=repr(form),
                remedy="Give one of these, or a list of them for several prompts.",
            )
        )


def _is_token_ids(form: object) -> TypeGuard[Sequence[int]]:
    """Whether a form of a prompt is a sequence of integers; bytes are none, though Python has them as integers."""
    if not isinstance(form, Sequence) or isinstance(form, str | bytes | bytearray):
        return False
    return all(isinstance(token, int) for token in form)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt.

    `token_ids` are the new tokens, including an end token but without the tokens of a stop string. `text` is the
    decoded text without special tokens; it ends before a stop string. `finish_reason` is "stop" after an end token or a
    stop string, and "length" after `max_tokens`. `stop_reason` is the stop string, if one ended the text.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stop_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuation. `prompt` is None if only token ids were given; `outputs` has one element."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
