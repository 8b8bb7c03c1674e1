"""The modules of a directory: stacks of experts are cut as the class that saved them means their axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.verify.source.decoders import DECODERS
from trtllm_ct.verify.source.files import TensorFiles, tensors_of
from trtllm_ct.verify.source.modules import WEIGHTS, read_modules
from trtllm_ct.verify.source.names import Names

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS = "model.layers.0.mlp.experts"
COUNT, HIDDEN, INNER = 2, 4, 3


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("model_type", "inputs_first"),
    [("qwen3_moe", False), ("qwen3_vl_moe", True), ("qwen3_vl_moe", False)],
    ids=["outputs first", "inputs first", "the class reads inputs first, the file has outputs first"],
)
def test_plain_stacks_give_each_expert_its_projections(tmp_path: Path, model_type: str, inputs_first: bool) -> None:
    gate_up, down = numbered(COUNT, 2 * INNER, HIDDEN), numbered(COUNT, HIDDEN, INNER)
    stored = {f"{EXPERTS}.gate_up_proj": gate_up, f"{EXPERTS}.down_proj": down}
    if inputs_first:
        stored = {name: np.ascontiguousarray(tensor.swapaxes(1, 2)) for name, tensor in stored.items()}
    save_file(stored, tmp_path / "model.safetensors")

    with TensorFiles(Catalog.from_directory(tmp_path)) as files:
        names = Names(model_type=model_type, native=False, multimodal=False, latent=False)
        modules = read_modules(tensors_of(files), names).by_key
        read = {key: module.plain_rows("weight", 0, module.plain_shape("weight")[0]) for key, module in modules.items()}

    expected = {}
    for expert in range(COUNT):
        parts = {"gate": gate_up[expert, :INNER], "up": gate_up[expert, INNER:], "down": down[expert]}
        expected |= {f"layers.0.mlp.experts.{expert}.{projection}": part for projection, part in parts.items()}
    assert read.keys() == expected.keys()
    for key, rows in expected.items():
        assert np.array_equal(read[key].view(np.float32).reshape(rows.shape), rows), key


def test_the_names_of_weights_are_those_of_all_formats() -> None:
    assert {decoder.codes for decoder in DECODERS.values()} | {"weight"} == WEIGHTS
