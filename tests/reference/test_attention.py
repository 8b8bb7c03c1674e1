from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from installed_transformers import typed_config
from torch import Tensor

from trtllm_ct.engine.quant_config import QuantConfig
from trtllm_ct.reference import build_model
from trtllm_ct.reference.activations import round_to_fp8
from trtllm_ct.reference.attention import register_fp8_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.reference

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
FP8_KV = QuantConfig(kv_cache_quant_algo="FP8")
TOKENS = torch.tensor([[3, 7, 1, 30, 12, 5]])
SCALES = (0.013, 0.21)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(typed_config(**CONFIG))
    return {name: tensor + 0.2 * torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


def kv_scales(k_scale: float, v_scale: float) -> Iterator[tuple[str, Tensor]]:
    for layer in range(2):
        yield f"model.layers.{layer}.self_attn.k_proj.k_scale", torch.tensor(k_scale)
        yield f"model.layers.{layer}.self_attn.v_proj.v_scale", torch.tensor([v_scale])


def build(weights: dict[str, Tensor], *scales: float, **options: Any) -> Any:
    tensors = [*weights.items(), *(kv_scales(*scales) if scales else ())]
    return build_model(CONFIG, FP8_KV, tensors, dtype=torch.float32, name="tiny", **options)


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, **options).logits


def plain(weights: dict[str, Tensor]) -> Any:
    return build_model(CONFIG, None, weights.items(), dtype=torch.float32, name="tiny")


def test_a_quantized_cache_changes_the_result(weights: dict[str, Tensor]) -> None:
    assert not torch.equal(logits(plain(weights)), logits(build(weights, *SCALES)))


def test_without_simulation_the_result_is_bit_identical_to_the_unquantized_model(weights: dict[str, Tensor]) -> None:
    """The scales are still part of the model, under their delivered names."""
    model = build(weights, *SCALES, quantize_activations=False)

    assert torch.equal(logits(plain(weights)), logits(model))
    assert model.state_dict()["model.layers.1.self_attn.v_proj.v_scale"].item() == pytest.approx(SCALES[1])
    assert model.config._attn_implementation == "sdpa"


class AttentionStub(torch.nn.Module):
    """The attributes of an attention module that the attention function reads; two query heads share one key head."""

    num_key_value_groups = 2
    is_causal = True

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.k_proj, self.v_proj = torch.nn.Module(), torch.nn.Module()
        self.k_proj.register_buffer("k_scale", torch.tensor(scale))
        self.v_proj.register_buffer("v_scale", torch.tensor([scale]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.125, 1.0, 2.0])
def test_powers_of_two_survive_a_cache_with_a_power_of_two_as_scale(scale: float, dtype: torch.dtype) -> None:
    from transformers import AttentionInterface

    functions = AttentionInterface()
    quantized, exact = functions[register_fp8_attention()], functions["sdpa"]
    query = torch.randn(1, 4, 5, 8, dtype=dtype)
    key, value = ((2.0 ** torch.randint(-3, 4, (1, 2, 5, 8))).to(dtype) for _ in range(2))
    module = AttentionStub(scale)

    assert torch.equal(exact(module, query, key, value, None)[0], quantized(module, query, key, value, None)[0])
    # 1.1 has no finite binary expansion, so that 1.1 times a power of two is never on the grid.
    assert not torch.equal(
        exact(module, query, 1.1 * key, value, None)[0], quantized(module, query, 1.1 * key, value, None)[0]
    )
    assert not torch.equal(
        exact(module, query, key, 1.1 * value, None)[0], quantized(module, query, key, 1.1 * value, None)[0]
    )


def attend_by_hand(attention: Any, hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """One attention layer in plain torch, keys and values rounded after rotation."""

    def heads(projected: Tensor) -> Tensor:
        return projected.view(1, -1, projected.shape[-1] // 4, 4).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        half = torch.cat((-x[..., 2:], x[..., :2]), dim=-1)
        return x * cosines + half * sines

    query = rotate(heads(attention.q_proj(hidden)))
    key = round_to_fp8(rotate(heads(attention.k_proj(hidden))), torch.tensor(SCALES[0]))
    value = round_to_fp8(heads(attention.v_proj(hidden)), torch.tensor(SCALES[1]))
    key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    scores = query @ key.transpose(2, 3) / 2.0
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ value
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


def test_one_layer_equals_the_computation_by_hand(weights: dict[str, Tensor]) -> None:
    model = build(weights, *SCALES)
    hidden = torch.randn(1, 6, 16)
    cosines, sines = model.model.rotary_emb(hidden, torch.arange(6)[None])
    attention = model.model.layers[0].self_attn

    with torch.no_grad():
        got, _ = attention(hidden_states=hidden, position_embeddings=(cosines, sines), attention_mask=None)
        want = attend_by_hand(attention, hidden, cosines, sines)

    assert torch.allclose(want, got, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_equals_forward_passes_without(weights: dict[str, Tensor], cache: str | None) -> None:
    model = build(weights, *SCALES)

    generated = model.generate(TOKENS, max_new_tokens=6, do_sample=False, cache_implementation=cache)

    with torch.no_grad():
        again = model(generated[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(generated[:, 6:], again[:, 5:])


def test_padding_masks_still_work(weights: dict[str, Tensor]) -> None:
    model = build(weights, *SCALES)
    padded = torch.cat((torch.zeros(1, 2, dtype=torch.long), TOKENS), dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]])

    with torch.no_grad():
        got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 2:]

    assert torch.allclose(logits(model), got, atol=1e-5)


def test_without_any_scale_the_scale_is_one(weights: dict[str, Tensor]) -> None:
    """An FP8 cache without checkpoint scales is legitimate, and adds nothing to the delivered tensors."""
    model = build(weights)

    assert torch.equal(logits(build(weights, 1.0, 1.0)), logits(model))
    assert model.state_dict().keys() == weights.keys()
