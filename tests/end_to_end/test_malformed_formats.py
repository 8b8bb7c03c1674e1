"""Malformed weights of the rarer formats end to end: each refused by name, and nothing left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from builders import tiny_config
from damages import ATTENTION, Case, Q, assert_refused, assert_told, block, config, element, tensors
from on_tensors import SPARSE_24_BITMASK, SPARSE_BITMASK

from trtllm_ct.base.errors import ConfigError, PayloadError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.formats.sparse.base import SparseFormat

K = f"{ATTENTION}.k_proj"
EXPERT = "model.layers.1.mlp.experts.3.down_proj"
NVFP4, FP8 = {"scheme": "nvfp4"}, {"scheme": "fp8-channel-token"}
MIXTURE = {"config": tiny_config("Qwen3MoeForCausalLM")}
BROKEN = "The file was damaged or cut, or its writer broke the format"


def sparse(entry: SparseFormat, name: str = Q) -> Callable[[dict[str, Tensor]], None]:
    """Store a weight in pieces, half of it zeros."""

    def replace(stored: dict[str, Tensor]) -> None:
        dense = stored.pop(f"{name}.weight")
        dense.view(torch.uint8)[:, ::2] = 0
        stored |= {f"{name}.{piece}": tensor for piece, tensor in entry.encode(dense).items()}

    return replace


def sparse_without(piece: str) -> Callable[[dict[str, Tensor]], None]:
    def replace(stored: dict[str, Tensor]) -> None:
        sparse(SPARSE_BITMASK)(stored)
        del stored[f"{Q}.{piece}"]

    return replace


def lost_mark(stored: dict[str, Tensor]) -> None:
    sparse(SPARSE_24_BITMASK)(stored)
    stored[f"{Q}.bitmask"][0, 0] = 0


def fused_by_an_early_writer(stored: dict[str, Tensor]) -> None:
    """One release put an underscore where a dot belongs."""
    stored["model.layers.0.mlp.experts.gate_up_proj_packed"] = torch.zeros(4, 128, 8, dtype=torch.int32)


CASES: dict[str, Case] = {
    "NVFP4 without its global scale": Case(
        options=NVFP4,
        damage=tensors(lambda stored: stored.pop(f"{Q}.weight_global_scale")),
        error=PlanError,
        where=f"{Q}.weight_global_scale",
        expected="one float32 element, which the scaled codes are divided by",
        found="no such tensor",
        remedy="Without it the weight is wrong by a factor of hundreds",
    ),
    "NVFP4 without the scale of its input": Case(
        options=NVFP4,
        damage=tensors(lambda stored: stored.pop(f"{Q}.input_global_scale")),
        error=PlanError,
        where=f"{Q}.input_global_scale",
        expected="one element: the static scale of the module's input",
        found="no such tensor",
        remedy="quantize again with dynamic activations",
    ),
    "NVFP4 with a global scale of zero": Case(
        options=NVFP4,
        damage=element(f"{Q}.weight_global_scale", 0),
        error=PayloadError,
        where=f"{Q}.weight_global_scale[0]",
        expected="a finite scale that is positive",
        found="0 (1 of 1 elements are bad)",
        remedy="damaged or badly calibrated",
    ),
    "NVFP4 with an infinite divisor of the input": Case(
        options=NVFP4,
        damage=element(f"{Q}.input_global_scale", float("inf")),
        error=PayloadError,
        where=f"{Q}.input_global_scale[0]",
        expected="a finite scale that is positive",
        found="inf (1 of 1 elements are bad)",
        remedy="damaged or badly calibrated",
    ),
    "MXFP4 with a scale that is no number": Case(
        options={"scheme": "mxfp4a16"},
        damage=element(f"{Q}.weight_scale", 255),
        error=PayloadError,
        where=f"{Q}.weight_scale[63, 1]",
        expected="a finite scale that is not negative",
        found="nan (1 of 128 elements are bad)",
        remedy="damaged or badly calibrated",
    ),
    "block scales of another grid": Case(
        options={"scheme": "fp8-block"},
        damage=tensors(lambda stored: stored.update({f"{Q}.weight_scale": torch.ones(2, 1)})),
        error=PlanError,
        where=f"{Q}.weight_scale",
        expected="shape [1, 1] for strategy block",
        found="float32 [2, 1]",
        remedy="Check block_structure in config_groups",
    ),
    "group indices beyond the groups": Case(
        options={"scheme": "int4-g64-actorder", "config": tiny_config(hidden=128)},
        damage=element(f"{Q}.weight_g_idx", 7),
        error=PayloadError,
        where=f"{Q}.weight_g_idx[127]",
        expected="a group from 0 to 1",
        found="7 (1 of 128 elements are bad)",
        remedy="Index and scale belong to different weights",
    ),
    "integers where floats are declared": Case(
        options=NVFP4,
        damage=tensors(lambda stored: stored.update({f"{Q}.weight_packed": torch.ones(64, 8, dtype=torch.int32)})),
        error=PlanError,
        where=Q,
        expected="tensors of one of the formats",
        found="fp4 tensor_group 16, input fp4 tensor_group 16 dynamic local, declared nvfp4-pack-quantized",
        remedy="Check num_bits, type and format in config_groups against the tool that wrote the file",
    ),
    "sparse without a bitmask": Case(
        options=FP8,
        damage=tensors(sparse_without("bitmask")),
        error=PlanError,
        where=f"{Q}.bitmask",
        expected=f"a tensor beside {Q}.",
        found="none",
        remedy=BROKEN,
    ),
    "sparse without values": Case(
        options=FP8,
        damage=tensors(sparse_without("compressed")),
        error=PlanError,
        where=f"{Q}.compressed",
        expected=f"a tensor beside {Q}.",
        found="none",
        remedy=BROKEN,
    ),
    "sparse with a lost mark": Case(
        options=FP8,
        damage=tensors(lost_mark),
        error=PayloadError,
        where=f"{Q}.bitmask",
        expected="2048 marks, one for each value",
        found="2044 marks",
        remedy=BROKEN,
    ),
    "a weight plain and in pieces": Case(
        options=FP8,
        damage=tensors(lambda stored: stored.update(compressed_beside(stored))),
        error=PlanError,
        where=f"{Q}.weight",
        expected="it once",
        found=f"it plain and in pieces, as {Q}.compressed",
        remedy="List only the right one in model.safetensors.index.json",
    ),
    "an expert that is lost": Case(
        options=MIXTURE,
        damage=tensors(lambda stored: stored.pop(f"{EXPERT}.weight_packed")),
        error=PlanError,
        where=f"{EXPERT}.weight",
        expected="a tensor that Qwen3MoeForCausalLM needs",
        found="no such tensor in any shard",
        remedy="No file is missing, so the checkpoint was saved without it",
    ),
    "layers pruned to different numbers of experts": Case(
        options=MIXTURE,
        damage=block(moe_sparsity_config={"method": "prune", "num_experts": [4, 3]}),
        error=PlanError,
        where="moe_sparsity_config.num_experts",
        expected="4 experts in every layer, as config.json says",
        found="layers that keep 3, 4",
        remedy="Engines hold the same number of experts in every layer",
    ),
    "fused experts under names of a broken release": Case(
        options=MIXTURE,
        damage=tensors(fused_by_an_early_writer),
        error=PlanError,
        where="model.layers.0.mlp.experts.gate_up_proj_packed",
        expected="only tensors of Qwen3MoeForCausalLM",
        found="int32 [4, 128, 8] without an owner",
        remedy="Nothing would read it",
    ),
    "a layer more than config.json says": Case(
        damage=config(lambda document: document.update(num_hidden_layers=1)),
        error=PlanError,
        where="model.layers.1.mlp.down_proj.weight_",
        expected="only tensors of LlamaForCausalLM",
        found=" without an owner",
        remedy="Nothing would read it: remove it, or take it out of an index; or correct architectures",
    ),
    "a mixture without the number of its experts": Case(
        options=MIXTURE,
        damage=config(lambda document: document.update(num_experts=None)),
        error=ConfigError,
        where="config.json: num_local_experts or n_routed_experts or num_experts",
        expected="a positive integer",
        found="None",
        remedy="Take config.json from the model that was quantized",
    ),
}


def compressed_beside(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    pieces = dict(stored)
    sparse(SPARSE_BITMASK)(pieces)
    return {name: pieces[name] for name in pieces.keys() - stored.keys()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_refused_by_name_and_nothing_is_left_behind(case: Case, tmp_path: Path) -> None:
    assert_refused(case, tmp_path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_command_line_says_the_same_and_exits_with_1(case: Case, tmp_path: Path) -> None:
    assert_told(case, tmp_path)
