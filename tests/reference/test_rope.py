"""Rotary embeddings in the spelling of transformers 4."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm_ct.reference.rope import older_rope_keys

YARN = {"rope_type": "yarn", "factor": 4.0}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}


@pytest.mark.parametrize(
    ("block", "older"),
    [
        ({"rope_theta": 5.0, "rope_type": "default"}, {"rope_theta": 5.0}),
        ({"rope_theta": 5.0, **YARN}, {"rope_theta": 5.0, "rope_scaling": YARN}),
        ({"rope_theta": 5.0, **MROPE}, {"rope_theta": 5.0, "rope_scaling": MROPE}),
        (
            {"rope_theta": 5.0, "rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_theta": 5.0, "partial_rotary_factor": 0.5},
        ),
    ],
)
def test_what_the_block_holds_keeps_its_place(block: dict[str, Any], older: dict[str, Any]) -> None:
    """The sections of Qwen-VL stand beside the default type, and are read from `rope_scaling`."""
    config = {"text_config": {"hidden_size": 8, "rope_parameters": block}}

    assert older_rope_keys(config) == {"text_config": {"hidden_size": 8} | older}
