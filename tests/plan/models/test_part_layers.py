"""config.json counts the layers of towers and of both stacks of an encoder-decoder: none of them may be lost."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_ct.plan.models.part_layers import lost_part_layers, part_layers


def layers(stack: str, *numbers: int) -> list[str]:
    return [f"{stack}.{number}.{leaf}.weight" for number in numbers for leaf in ("attn", "mlp")]


def lost(config: dict[str, Any], *names: str) -> list[str]:
    return [*lost_part_layers(names, part_layers(config))]


@pytest.mark.parametrize("key", ["depth", "num_hidden_layers", "num_layers"])
@pytest.mark.parametrize("stack", ["model.visual.blocks", "vision_tower.encoder.layer", "model.vision_model.layers"])
def test_a_layer_that_a_tower_has_lost_is_named(key: str, stack: str) -> None:
    config = {"vision_config": {key: 4}}

    assert lost(config, *layers(stack, 0, 1, 2, 3)) == []
    assert lost(config, *layers(stack, 0, 1, 3)) == [f"{stack}.2"]
    assert lost(config, *layers(stack, 0)) == [f"{stack}.{number}" for number in (1, 2, 3)]


def test_a_tower_that_is_not_stored_has_lost_nothing() -> None:
    assert lost({"vision_config": {"depth": 4}}, *layers("model.layers", 0, 1)) == []


@pytest.mark.parametrize(
    "config",
    [
        {"encoder_layers": 3, "decoder_layers": 2},
        {"num_layers": 3, "num_decoder_layers": 2},
        {"encoder": {"num_hidden_layers": 3}, "decoder": {"num_hidden_layers": 2}},
    ],
)
def test_both_stacks_of_an_encoder_decoder_are_counted(config: dict[str, Any]) -> None:
    config = {"is_encoder_decoder": True, **config}
    encoder, decoder = layers("model.encoder.layers", 0, 1, 2), layers("model.decoder.layers", 0, 1)

    assert lost(config, *encoder, *decoder) == []
    assert lost(config, *encoder[:-2], *decoder) == ["model.encoder.layers.2"]
    assert lost(config, *encoder, *decoder[:-2]) == ["model.decoder.layers.1"]


def test_the_outer_layers_count() -> None:
    """Blocks of T5 have layers inside."""
    config = {"is_encoder_decoder": True, "num_layers": 3}
    names = [f"encoder.block.{block}.layer.{layer}.wo.weight" for block in (0, 2) for layer in (0, 1)]

    assert lost(config, *names) == ["encoder.block.1"]


def test_a_tower_in_stages_is_not_counted() -> None:
    config = {"vision_config": {"num_layers": 4, "depths": [2, 2, 6, 2]}}

    assert lost(config, *layers("vision_model.encoder.layers", 0, 1)) == []


@pytest.mark.parametrize("value", [None, 0, True, "4", [2]])
def test_no_number_is_no_count(value: object) -> None:
    assert part_layers({"vision_config": {"depth": value}, "audio_config": value}) == ()
