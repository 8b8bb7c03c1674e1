"""Choose the next token from logits and sampling parameters.

The order is temperature, then top-k, then top-p among the remaining tokens, each on probabilities that sum to one. This
is the order of TensorRT-LLM `_torch/pyexecutor/sampler.py`. TensorRT-LLM uses another random generator, so sampled
texts differ between the engines; greedy texts don't.
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
    """Chooses the tokens of one prompt.

    The random generator belongs to the sampler: the same parameters give the same tokens, whatever else runs.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator().manual_seed(params.seed or 0)

    def __call__(self, logits: Tensor) -> int:
        """Choose the next token from logits [vocabulary]; raises `PayloadError` if a logit is NaN."""
        if bool(logits.isnan().any()):
            raise PayloadError(
                Fault(
                    where="logits",
                    expected="numbers",
                    found=f"{int(logits.isnan().sum())} of {logits.numel()} that are NaN",
                    remedy="Run `trtllm-ct verify` on the checkpoint, which names scales, codes and plain weights that "
                    "are no finite numbers; if it names none, float16 may overflow where bfloat16 does not.",
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
    """The probability with which each token is sampled: float64 [vocabulary], with sum 1.

    `temperature` (above 0) divides `logits`. `top_k` keeps the k most likely tokens. Of these, `top_p` (above 0) keeps
    the smallest number of most likely tokens whose probabilities add up to at least `top_p`. Tokens with equal logits
    are ranked by their ids. None turns a step off; so does 0 for `top_k`.
    """
    ordered, order = logits.double().sort(descending=True, stable=True)
    # Subtract the largest logit first, so that a tiny temperature can't turn all logits into infinities.
    probabilities = ((ordered - ordered[0]) / (temperature or 1.0)).softmax(0)
    if top_k:
        probabilities[top_k:] = 0
        probabilities /= probabilities.sum()
    if top_p is not None:
        sum_before = probabilities.cumsum(0) - probabilities
        probabilities[sum_before >= top_p] = 0
        probabilities /= probabilities.sum()
    return torch.zeros_like(probabilities).scatter(0, order, probabilities)
