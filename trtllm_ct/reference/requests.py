"""What goes into the reference engine's `LLM` and what comes out; torch is not imported here.

Names and meanings are those of TensorRT-LLM's LLM API, so that a program runs on either engine.
Source: TensorRT-LLM `sampling_params.py` and `executor/result.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Literal, Self

from trtllm_ct.base.errors import FaultCollector, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CompletionOutput", "RequestOutput", "SamplingParams"]

_SEEDS = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens after a prompt are chosen, and when to stop.

    `max_tokens` is the most tokens to generate. The largest logit wins (greedy decoding) where nothing else is given,
    and for `temperature=0`, `top_k=1` and `top_p=0`. Otherwise a token is drawn: logits are divided by `temperature`
    (1 when None); `top_k` leaves the k most likely tokens (0 and None leave all), and of these `top_p` the fewest that
    together have that share of the probability. The same `seed` draws the same tokens; None is 0.
    `stop` is one or several strings: the text ends before the first of them.
    Raises `UsageError` with every value that has no meaning.
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
            ("seed", int, 0, _SEEDS - 1, "an integer between 0 and 2^64 - 1"),
        )
        faults = FaultCollector()
        for name, kind, low, high, expected in ranges:
            value = getattr(self, name)
            optional = value is None and name != "max_tokens"
            if not optional and not _within(value, kind, low, high):
                remedy = "Leave it out for the default, or give a value in this range."
                faults.add(where=f"SamplingParams.{name}", expected=expected, found=repr(value), remedy=remedy)
        if not all(isinstance(stop, str) and stop for stop in self.stops):
            remedy = "Every text contains the empty string; give strings that can be waited for."
            faults.add(where="SamplingParams.stop", expected="strings", found=repr(self.stop), remedy=remedy)
        faults.raise_if_any(UsageError)

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        drawing = (self.temperature, self.top_p, self.top_k)
        return drawing == (None, None, None) or self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @classmethod
    def of(cls, params: object) -> Self:
        """`params` itself, defaults for None, or TensorRT-LLM's own class read field by field.

        Raises `UsageError` for a field of that class that the reference engine lacks and that isn't at its default.
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


def _within(value: object, kind: type, low: float, high: float) -> bool:
    number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return number and low <= value <= high and value != inf  # type: ignore[operator]


def _changed_fields(params: Any) -> dict[str, Any]:
    """Public fields that differ from those of an instance made without arguments, which settles some by others."""
    plain = type(params)()
    public = [field.name for field in fields(params) if not field.name.startswith("_")]
    changed = {name: getattr(params, name) for name in public}
    return {name: value for name, value in changed.items() if not _same(value, getattr(plain, name))}


def _same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and one == other)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt.

    `token_ids` are the new tokens, an end token included, those of a stop string not; `text` is what they decode to,
    without special tokens. `finish_reason` is "stop" after an end token or a stop string, which is then `stop_reason`,
    and "length" after `max_tokens`.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stop_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt, None where token ids were given, and its continuations, of which there is one."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
