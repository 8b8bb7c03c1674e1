from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from trtllm_ct.base.errors import ConfigError, UsageError
from trtllm_ct.reference.requests import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.reference

VOCABULARY = ["<end>", "a", "b", "c", " ", "<0xC3>", "<0xA9>", "bc"]
END, A, B, C, SPACE, HALF, OTHER_HALF, BC = range(8)


@pytest.fixture
def directory(save_tiny: Callable[..., Path]) -> Path:
    """A random model with a tokenizer that knows a few letters, and bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    path = save_tiny("llama", vocab_size=len(VOCABULARY), bos_token_id=None, eos_token_id=END)
    model = models.BPE({token: index for index, token in enumerate(VOCABULARY)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    return path


@pytest.fixture
def llm(directory: Path) -> Any:
    from trtllm_ct.reference import ReferenceLLM

    return ReferenceLLM(directory)


def follow(llm: Any, *token_ids: int) -> None:
    """Make the model generate these tokens after any prompt."""
    order = iter(token_ids)

    class Script(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            wanted = torch.tensor(next(order)).expand(hidden.shape[:-1])
            return torch.nn.functional.one_hot(wanted, len(VOCABULARY)).float()

    llm._model.lm_head = Script()


def test_greedy_tokens_are_those_of_generate_text(directory: Path, llm: Any) -> None:
    from trtllm_ct.reference import generate_text

    want = generate_text(directory, "ab c", max_tokens=12, dtype=torch.float32)

    got = llm.generate("ab c", SamplingParams(max_tokens=12))

    assert (got.prompt, got.prompt_token_ids) == ("ab c", [A, B, SPACE, C])
    output = got.outputs[0]
    assert (output.text, tuple(output.token_ids), output.finish_reason) == (
        want.text,
        want.token_ids,
        want.finish_reason,
    )


def test_one_prompt_gives_one_result_and_a_list_a_list(llm: Any) -> None:
    params = SamplingParams(max_tokens=4)
    by_text, by_ids = llm.generate("ab", params), llm.generate([A, B], params)

    assert by_ids.prompt is None
    assert by_text.outputs == by_ids.outputs
    assert llm.generate(["ab", "c"], params)[0] == by_text
    assert llm.generate([[A, B], [C]], params)[0] == by_ids
    assert llm.generate([], params) == []


def test_without_parameters_it_generates_32_tokens(llm: Any) -> None:
    follow(llm, *[A] * 40)

    assert llm.generate("b").outputs[0].token_ids == [A] * 32


def test_each_prompt_may_have_parameters_of_its_own(llm: Any) -> None:
    got = llm.generate(["a", "a"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=3)])

    assert [len(result.outputs[0].token_ids) for result in got] == [1, 3]


def test_a_sampled_text_depends_on_its_seed_and_not_on_other_prompts(llm: Any) -> None:
    drawn = SamplingParams(max_tokens=12, temperature=20.0, seed=5)

    alone = llm.generate("ab", drawn).outputs[0]
    among = llm.generate(["c", "ab"], drawn)[1].outputs[0]

    assert alone == among
    assert alone != llm.generate("ab", SamplingParams(max_tokens=12, temperature=20.0, seed=6)).outputs[0]


def test_an_end_token_stops_and_is_among_the_tokens(llm: Any) -> None:
    follow(llm, A, END, B)

    output = llm.generate("a", SamplingParams(max_tokens=9)).outputs[0]

    assert (output.text, output.token_ids, output.finish_reason, output.stop_reason) == ("a", [A, END], "stop", None)


@pytest.mark.parametrize(
    ("stop", "text", "token_ids"),
    [
        ("c", "ab ", [A, B, SPACE]),
        (["zz", " "], "ab", [A, B]),
        (["b c", "b"], "a", [A]),
        ("ab", "", []),
        (["c", "abc"], "ab ", [A, B, SPACE]),
    ],
)
def test_a_text_ends_before_a_stop_string(llm: Any, stop: str | list[str], text: str, token_ids: list[int]) -> None:
    follow(llm, A, B, SPACE, C, A, A)

    output = llm.generate("a", SamplingParams(max_tokens=6, stop=stop)).outputs[0]

    assert (output.text, output.token_ids, output.finish_reason) == (text, token_ids, "stop")
    assert output.stop_reason in ([stop] if isinstance(stop, str) else stop)


def test_a_token_that_overlaps_the_stop_string_is_dropped(llm: Any) -> None:
    follow(llm, A, BC, A)

    output = llm.generate("a", SamplingParams(max_tokens=6, stop="c")).outputs[0]

    assert (output.text, output.token_ids) == ("ab", [A])


def test_a_character_of_two_tokens_is_waited_for(llm: Any) -> None:
    follow(llm, HALF, OTHER_HALF, A, A)

    output = llm.generate("a", SamplingParams(max_tokens=3, stop="é")).outputs[0]

    assert (output.text, output.token_ids, output.stop_reason) == ("", [], "é")


def test_token_ids_need_no_tokenizer(directory: Path) -> None:
    from trtllm_ct.reference import ReferenceLLM

    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ReferenceLLM(directory)
    llm = ReferenceLLM(directory, skip_tokenizer_init=True)

    got = llm.generate([A, B], SamplingParams(max_tokens=3))

    assert len(got.outputs[0].token_ids) == 3
    assert got.outputs[0].text == ""
    with pytest.raises(UsageError, match="token ids"):
        llm.generate("ab")
    with pytest.raises(UsageError, match=r"SamplingParams\.stop"):
        llm.generate([A], SamplingParams(stop="b"))


def test_a_tokenizer_may_be_given(directory: Path, llm: Any, tmp_path: Path) -> None:
    from trtllm_ct.reference import ReferenceLLM

    elsewhere = tmp_path / "tokenizer"
    llm.tokenizer.save_pretrained(elsewhere)
    (directory / "tokenizer.json").unlink()

    for tokenizer in (llm.tokenizer, elsewhere, str(elsewhere)):
        assert ReferenceLLM(directory, tokenizer=tokenizer).generate("ab").prompt_token_ids == [A, B]


@pytest.mark.parametrize(
    ("given", "want"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.float64, torch.float64)],
    ids=str,
)
def test_dtype_is_that_of_the_checkpoint_or_the_one_given(directory: Path, given: Any, want: torch.dtype) -> None:
    from trtllm_ct.reference import ReferenceLLM

    assert ReferenceLLM(directory, dtype=given)._model.dtype is want


@pytest.mark.parametrize("prompt", ["", [], [A, 8], [-1], [[]]], ids=str)
def test_a_prompt_without_tokens_or_with_unknown_ones_is_refused(llm: Any, prompt: Any) -> None:
    with pytest.raises(UsageError, match="token ids below 8"):
        llm.generate([prompt] if prompt == [] else prompt)


@pytest.mark.parametrize(
    "form", [{"prompt": "ab"}, {"prompt": "ab", "prompt_token_ids": [A, B]}, {"prompt": "ab", "prompt_token_ids": None}]
)
def test_a_prompt_may_have_the_forms_of_tensorrt_llm(llm: Any, form: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=4)

    assert llm.generate(form, params) == llm.generate("ab", params)
    assert llm.generate([form, "c"], params) == llm.generate(["ab", "c"], params)


@pytest.mark.parametrize("ids", [[A, B], (A, B)])
def test_token_ids_may_have_the_form_of_tensorrt_llm(llm: Any, ids: Any) -> None:
    params = SamplingParams(max_tokens=4)

    assert llm.generate({"prompt_token_ids": ids}, params) == llm.generate(ids, params) == llm.generate([A, B], params)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        3,
        b"ab",
        {},
        {"prompt": None},
        {"prompt": 3},
        {"prompt": [A]},
        {"prompt_token_ids": "ab"},
        {"prompt_token_ids": b"ab"},
        {"text": "ab"},
        {"prompt": "ab", "multi_modal_data": {"image": []}},
        {"ab"},
        [A, "b"],
    ],
    ids=str,
)
def test_what_is_no_prompt_is_refused_before_any_prompt_runs(llm: Any, wrong: Any) -> None:
    follow(llm)  # which fails for the first token

    for inputs in (wrong, ["ab", wrong]):
        with pytest.raises(UsageError, match="prompt: expected a text, token ids, or a dictionary"):
            llm.generate(inputs)


def test_the_number_of_parameters_must_equal_the_number_of_prompts(llm: Any) -> None:
    with pytest.raises(UsageError, match="expected 2, one a prompt, found 3"):
        llm.generate(["a", "b"], [SamplingParams()] * 3)


def test_an_unknown_dtype_is_refused(directory: Path) -> None:
    from trtllm_ct.reference import ReferenceLLM

    with pytest.raises(UsageError, match="float8"):
        ReferenceLLM(directory, dtype="float8")


def test_it_closes_like_the_engines(directory: Path) -> None:
    from trtllm_ct.reference import ReferenceLLM

    with ReferenceLLM(directory) as llm:
        assert llm.generate("a").outputs
    assert llm._model is None
