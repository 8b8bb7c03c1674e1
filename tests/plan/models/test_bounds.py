"""Counts that config.json states are compared with the headers before anything counts to them."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import tiny_config

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import ConfigError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.plan.models.bounds import check_counts
from trtllm_ct.plan.models.sites import Model

LAYERS = 2


def catalog_of(tensors: int, longest: int) -> Catalog:
    """Return a catalog of so many tensors, the longest axis of which has `longest` entries."""
    spec = TensorSpec(DType.BF16, (longest,))
    stored = {f"t{number}": StoredTensor(f"t{number}", spec, "model.safetensors", 0) for number in range(tensors)}
    return Catalog(source=Folder(Path("m")), tensors=stored, files=("model.safetensors",))


def mixture(experts: int, layers: int = LAYERS) -> Model:
    config = tiny_config("Qwen3MoeForCausalLM", num_hidden_layers=layers, num_experts=experts)
    return Model.from_config(config)


@pytest.mark.parametrize(
    ("tensors", "longest", "experts", "fits"),
    [
        (8, 4, 8, True),  # an expert in each tensor
        (8, 4, 9, False),
        (4, 9, 9, True),  # all experts in one tensor
        (4, 9, 10, False),
    ],
)
def test_there_are_no_more_experts_than_tensors_or_entries_of_one(
    tensors: int, longest: int, experts: int, fits: bool
) -> None:
    model, catalog = mixture(experts), catalog_of(tensors, longest)
    if fits:
        check_counts(model, catalog)
        return
    with pytest.raises(ConfigError) as caught:
        check_counts(model, catalog)
    (fault,) = caught.value.faults
    assert (fault.where, fault.found) == ("config.json: number of experts", str(experts))
    assert fault.expected.endswith(f"entries in one, {max(tensors, longest)}")


@pytest.mark.parametrize(("tensors", "fits"), [(LAYERS, True), (LAYERS - 1, False)])
def test_there_are_no_more_layers_than_tensors(tensors: int, fits: bool) -> None:
    model, catalog = mixture(1), catalog_of(tensors, 4)
    if fits:
        check_counts(model, catalog)
        return
    with pytest.raises(ConfigError) as caught:
        check_counts(model, catalog)
    assert [fault.where for fault in caught.value.faults] == ["config.json: num_hidden_layers"]
