"""Modules that are found in the files: their sizes come from headers, in whatever layout their codes are."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import quantization_block

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import PlanError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.checkpoint.header import StoredTensor
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.config.reader import CompressedTensorsConfigReader
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.plan.models.sites import Model
from trtllm_ct.plan.options import PlanOptions
from trtllm_ct.plan.planner import make_plan

HIDDEN, HEAD_DIM = 2048, 64
CONFIG = {
    "architectures": ["SeedOssForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": HIDDEN,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": HEAD_DIM,
    "intermediate_size": HIDDEN,
    "vocab_size": 128,
}
BLOCK = quantization_block(
    {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}},
    ["lm_head", "re:.*mlp", "re:.*o_proj"],
    "marlin-24",
)


def catalog_of(heads: int) -> Catalog:
    """A layer whose K and V Linears have so many heads, in the tiles of marlin-24, and a bias."""
    plain = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    plain |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), (HIDDEN, HIDDEN))
    specs = {
        "model.embed_tokens.weight": TensorSpec(DType.BF16, (128, HIDDEN)),
        "model.norm.weight": TensorSpec(DType.BF16, (HIDDEN,)),
        "lm_head.weight": TensorSpec(DType.BF16, (128, HIDDEN)),
        **{f"model.layers.0.{name}.weight": TensorSpec(DType.BF16, shape) for name, shape in plain.items()},
    }
    for name, rows in (("q_proj", HIDDEN), ("k_proj", heads * HEAD_DIM), ("v_proj", heads * HEAD_DIM)):
        prefix = f"model.layers.0.self_attn.{name}"
        specs |= {
            f"{prefix}.weight_packed": TensorSpec(DType.I32, (HIDDEN // 32, 2 * rows)),
            f"{prefix}.scale_packed": TensorSpec(DType.F16, (1, rows)),
            f"{prefix}.meta": TensorSpec(DType.I16, (HIDDEN // 32, 2 * rows)),
            f"{prefix}.bias": TensorSpec(DType.BF16, (rows,)),
        }
    tensors = {name: StoredTensor(name=name, spec=spec, file="x", offset=0) for name, spec in specs.items()}
    return Catalog(source=Folder(Path()), tensors=tensors, files=("x",))


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_heads_of_codes_in_tiles_are_counted_by_the_rows_of_the_weight(heads: int) -> None:
    """With more ranks than heads, releases repeat a bias wrongly: that tells how many heads were counted."""
    config = CompressedTensorsConfigReader().read({"quantization_config": BLOCK})

    def plan(ranks: int) -> None:
        options = PlanOptions(engine="stock-1.3", parallel=Parallel(tensor=ranks))
        make_plan(config, catalog_of(heads), Model.from_config(CONFIG), options)

    plan(heads)
    with pytest.raises(PlanError, match=r"k_proj\.bias: expected a K/V head for each of"):
        plan(2 * heads)


def test_every_layer_of_an_encoder_decoder_belongs_to_it() -> None:
    """`num_hidden_layers` counts one of its stacks: layers of the other one are no draft layers."""
    block = quantization_block(
        {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}},
        [],
        "int-quantized",
    )
    specs = {"model.shared.weight": TensorSpec(DType.BF16, (16, 64))}
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        for layer in range(layers):
            prefix = f"model.{stack}.layers.{layer}.fc1"
            specs[f"{prefix}.weight"] = TensorSpec(DType.I8, (64, 64))
            specs[f"{prefix}.weight_scale"] = TensorSpec(DType.BF16, (64, 1))
    tensors = {name: StoredTensor(name=name, spec=spec, file="x", offset=0) for name, spec in specs.items()}
    keys = {"num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 3}
    model = Model.from_config({"architectures": ["AnyForConditionalGeneration"], "is_encoder_decoder": True, **keys})
    config = CompressedTensorsConfigReader().read({"quantization_config": block})

    catalog = Catalog(source=Folder(Path()), tensors=tensors, files=("x",))
    plan = make_plan(config, catalog, model, PlanOptions(to="dense"))

    reasons = {module.reason for module in plan.modules if module.name.endswith("fc1")}
    assert reasons == {"target dense holds plain weights only"}
