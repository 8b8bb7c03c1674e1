"""The next token, from logits and sampling parameters.

Temperature, then top-k, then top-p among what is left, each on probabilities that sum to one: the order of TensorRT-LLM
`_torch/pyexecutor/sampler.py`. Its random numbers are those of another generator, so drawn texts differ between
engines; greedy ones don't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trtllm_ct.base.errors import Fault, PayloadError

if TYPE_CHECKING:
    from torch import Tensor

    from trtllm_ct.reference.requests import SamplingParams

__all__ = ["Sampler", "token_probabilities"]


class Sampler:
    """Chooses the tokens of one prompt; the same parameters choose the same tokens, whatever else runs meanwhile."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator().manual_seed(params.seed or 0)

    def __call__(self, logits: Tensor) -> int:
        """The next token from logits [vocabulary]; raises `PayloadError` when one of them is no number."""
        if bool(logits.isnan().any()):
            raise PayloadError(
                Fault(
                    where="logits",
                    expected="numbers",
                    found=f"{int(logits.isnan().sum())} of {logits.numel()} that are none",
                    remedy="Run `trtllm-ct verify` on the checkpoint; float16 overflows where bfloat16 does not.",
                )
            )
        params = self._params
        if params.greedy:
            return int(logits.argmax())
        probabilities = token_probabilities(
            logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p
        )
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def token_probabilities(
    logits: Tensor, *, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """What each token is drawn with: float64 [vocabulary], of sum 1.

    `temperature` (above 0) divides `logits`; `top_k` leaves the k most likely tokens, and of these `top_p` (above 0)
    the fewest whose probabilities together reach it. Of equal tokens the first go before the others. None and, for
    `top_k`, 0 leave everything.
    """
    ordered, order = logits.double().sort(descending=True, stable=True)
    # Subtracting the largest first keeps a tiny temperature from making infinities of all of them.
    probabilities = ((ordered - ordered[0]) / (temperature or 1.0)).softmax(0)
    if top_k:
        probabilities[top_k:] = 0
        probabilities /= probabilities.sum()
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        probabilities[before >= top_p] = 0
        probabilities /= probabilities.sum()
    return torch.zeros_like(probabilities).scatter(0, order, probabilities)
