from __future__ import annotations

import inspect
import pickle
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_ct.base.errors import PayloadError, UsageError
from trtllm_ct.reference.requests import SamplingParams
from trtllm_ct.reference.sampling import Sampler, token_probabilities

logits_of_tokens = st.lists(st.integers(-400, 400), min_size=1, max_size=30).map(lambda steps: torch.tensor(steps) / 8)
temperatures = st.floats(1e-3, 1e3)
shares = st.floats(0.01, 1)


@settings(deadline=None)
@given(logits_of_tokens, temperatures)
def test_without_a_cut_it_is_the_softmax(logits: torch.Tensor, temperature: float) -> None:
    got = token_probabilities(logits, temperature=temperature)

    torch.testing.assert_close(got, (logits.double() / temperature).softmax(0))


@settings(deadline=None)
@given(logits_of_tokens, temperatures, st.integers(1, 40), shares)
def test_kept_tokens_keep_their_order_and_sum_to_one(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> None:
    got = token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)

    assert float(got.sum()) == pytest.approx(1)
    left = got > 0
    assert 1 <= int(left.sum()) <= top_k
    assert got[left].argsort(stable=True).tolist() == logits[left].double().argsort(stable=True).tolist()
    assert left.all() or logits[left].min() >= logits[~left].max()


@settings(deadline=None)
@given(logits_of_tokens, shares)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(logits: torch.Tensor, top_p: float) -> None:
    whole = token_probabilities(logits)

    left = token_probabilities(logits, top_p=top_p) > 0

    assert float(whole[left].sum()) >= top_p - 1e-9
    assert float(whole[left].sum() - whole[left].min()) < top_p + 1e-9


def test_top_p_applies_to_the_tokens_that_top_k_keeps() -> None:
    """With top_k=2, the probabilities 0.4, 0.3, 0.3 become 4/7 and 3/7; for top_p=0.5 the first token is enough."""
    logits = torch.tensor([0.4, 0.3, 0.3]).log()

    assert token_probabilities(logits, top_k=2, top_p=0.5).tolist() == [1, 0, 0]
    assert token_probabilities(logits, top_p=0.5).count_nonzero() == 2


def test_the_smallest_temperature_takes_the_largest_logit() -> None:
    assert token_probabilities(torch.tensor([1.0, 3.0, 2.0]), temperature=5e-324).tolist() == [0, 1, 0]


def test_impossible_tokens_are_never_drawn() -> None:
    assert token_probabilities(torch.tensor([-torch.inf, 0.0, -torch.inf]), temperature=7).tolist() == [0, 1, 0]


@pytest.mark.parametrize("greedy", [{}, {"temperature": 0}, {"top_k": 1, "temperature": 9}, {"top_p": 0.0, "top_k": 5}])
def test_greedy_parameters_take_the_largest_logit(greedy: dict[str, Any]) -> None:
    sampler = Sampler(SamplingParams(**greedy))

    assert [sampler(torch.tensor([0.0, 0.2, 0.1])) for _ in range(20)] == [1] * 20


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampler = Sampler(SamplingParams(temperature=2.0, seed=11))

    counts = torch.tensor([sampler(logits) for _ in range(4000)]).bincount(minlength=4)

    want = 4000 * token_probabilities(logits, temperature=2.0)
    assert float(((counts - want) ** 2 / want).sum()) < 16.27  # chi-squared with 3 degrees of freedom: one in 1000


@pytest.mark.parametrize(
    ("first", "second", "same"), [(3, 3, True), (3, 4, False), (None, 0, True), (2**64 - 1, 5, False)]
)
def test_a_seed_decides_what_is_drawn(first: int | None, second: int | None, same: bool) -> None:
    logits = torch.zeros(1000)

    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler(logits) for _ in range(8)]

    assert (drawn(first) == drawn(second)) is same


def test_the_global_generator_is_not_touched() -> None:
    before = torch.random.get_rng_state()

    Sampler(SamplingParams(top_k=3, seed=1))(torch.zeros(9))

    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "more", [{"n": 2}, {"logprobs": 1}, {"ignore_eos": True}, {"stop_token_ids": [1]}, {"n": 2, "logprobs": 1}]
)
def test_parameters_that_only_tensorrt_llm_has_are_refused_by_name(more: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="max_tokens, temperature, top_p, top_k, seed, stop") as caught:
        SamplingParams(max_tokens=3, **more)

    assert {fault.where for fault in caught.value.faults} == {f"SamplingParams.{name}" for name in more}


def test_parameters_have_names() -> None:
    with pytest.raises(UsageError, match="by name"):
        SamplingParams(32)  # type: ignore[misc]


@pytest.mark.parametrize("stop", [3, b"a", [b"a"], [3], True])
def test_stops_that_are_no_texts_are_refused(stop: Any) -> None:
    with pytest.raises(UsageError, match=r"SamplingParams\.stop"):
        SamplingParams(stop=stop)


def test_parameters_are_copied_and_shown_like_those_of_any_dataclass() -> None:
    params = SamplingParams(max_tokens=3)

    assert replace(params, seed=1) == SamplingParams(max_tokens=3, seed=1)
    assert pickle.loads(pickle.dumps(params)) == params
    assert list(inspect.signature(SamplingParams).parameters) == [field.name for field in fields(SamplingParams)]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1)], ids=["greedy", "drawn"])
def test_nan_logits_are_refused(params: SamplingParams) -> None:
    with pytest.raises(PayloadError, match="1 of 3 that are NaN"):
        Sampler(params)(torch.tensor([0.0, torch.nan, 1.0]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", None),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_p", 1.1),
        ("top_p", -1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [7]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"SamplingParams\.{name}: "):
        SamplingParams(**{name: value})


def test_all_values_out_of_range_are_reported_together() -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(max_tokens=-1, top_p=2, seed=-3)

    assert [fault.where for fault in caught.value.faults] == [
        f"SamplingParams.{name}" for name in ("max_tokens", "top_p", "seed")
    ]


@dataclass(kw_only=True)
class EngineParams:
    """Like TensorRT-LLM's class: it has more fields, and derives some of them from others."""

    max_tokens: int = 32
    temperature: float | None = None
    stop: str | None = None
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    embedding_bias: torch.Tensor | None = None
    _words: list[int] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.best_of = self.best_of or self.n


def test_the_engines_own_class_is_read_field_by_field() -> None:
    engine_params = EngineParams(max_tokens=7, temperature=0.5, stop="x")
    engine_params._words = [1]

    assert SamplingParams.of(engine_params) == SamplingParams(max_tokens=7, temperature=0.5, stop="x")


def test_fields_that_the_reference_engine_lacks_are_refused_by_name() -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams.of(EngineParams(n=2, logprobs=1, embedding_bias=torch.zeros(2)))

    assert [fault.where.partition(".")[2] for fault in caught.value.faults] == [
        "n",
        "best_of",
        "logprobs",
        "embedding_bias",
    ]


@pytest.mark.parametrize("params", [{"max_tokens": 3}, 32, EngineParams])
def test_other_types_are_refused(params: object) -> None:
    with pytest.raises(UsageError, match=r"trtllm_ct\.SamplingParams"):
        SamplingParams.of(params)
