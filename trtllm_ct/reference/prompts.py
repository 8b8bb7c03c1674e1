"""The tokens of a prompt: of the text itself, or of the text as a message of the user in the tokenizer's chat template.

A chat template is a program of the checkpoint. transformers runs it in the sandbox of Jinja.
"""

from __future__ import annotations

from typing import Any

from trtllm_ct.base.errors import ConfigError, Fault, UsageError
from trtllm_ct.reference.architecture import in_one_line

__all__ = ["has_chat_template", "prompt_tokens"]


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers has a chat template."""
    return bool(tokenizer.chat_template)


def prompt_tokens(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Return the token ids of a prompt.

    With `chat`, the prompt is the one message of the user in the tokenizer's chat template, which ends where the answer
    begins. Raises `UsageError` for a prompt without tokens, and `ConfigError` for a template that can't be applied.
    """
    # A template adds tokens of its own, so the prompt itself has to be looked at.
    ids: list[int] = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids:
        raise UsageError(
            Fault(
                where="prompt",
                expected="text of one token or more",
                found=repr(prompt),
                remedy="Give some text to continue.",
            )
        )
    if not chat:
        return ids
    # The template has the special tokens that the tokenizer would add.
    ids = tokenizer(_in_template(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    return [*ids]


def _in_template(tokenizer: Any, prompt: str) -> str:
    """Return the text that the chat template makes of a prompt."""
    messages = [{"role": "user", "content": prompt}]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A template may fail in any way in which an expression of Jinja can, by its own `raise_exception` too.
    except Exception as error:
        raise ConfigError(
            Fault(
                where="chat template",
                expected="one that takes a single message of the user",
                found=in_one_line(error),
                remedy="Continue the plain text: give --no-chat, or in Python leave chat out.",
            )
        ) from error
    return text
