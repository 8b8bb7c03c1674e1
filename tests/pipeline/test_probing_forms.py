"""Values that decide a mode are found in every form that a checkpoint may have, and named as in its files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import SCHEMES, quantization_block, rewrite, rewrite_config, tiny_config, write_checkpoint
from fused_experts import fuse_experts
from mistral_form import write_native
from on_tensors import SPARSE_BITMASK

from trtllm_ct.formats.sparse.compressed_io import save_compressed
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.plan.probe import Probe

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MLP = "model.layers.0.mlp"
Q = "model.layers.0.self_attn.q_proj"
SIZES = {"layers": 1, "vocabulary": 4}
LLAMA = tiny_config(hidden=64, kv_heads=4, intermediate=64, **SIZES)
FILE = "model.safetensors"


class TestExperts:
    @pytest.mark.parametrize(("shared", "keys"), [(True, ("[0]", "[1]")), (False, ("[0, 0:1]", "[0, 1:2]"))])
    def test_of_experts_in_one_tensor_are_named_by_expert_and_rows(
        self, tmp_path: Path, shared: bool, keys: tuple[str, str]
    ) -> None:
        def fuse(stored: dict[str, Tensor]) -> None:
            for i, name in enumerate(name for name in stored if name.endswith("weight_global_scale")):
                stored[name] = torch.tensor([1.5 if shared else 1.5 + i])
            fuse_experts(stored)

        built = write_checkpoint(
            tmp_path, config=tiny_config("Qwen3MoeForCausalLM", num_experts=2, **SIZES), scheme="nvfp4", edit=fuse
        )
        name = f"{MLP}.experts.gate_up_proj.weight_global_scale"

        scalars = open_checkpoint(tmp_path).probe.scalars

        of_experts = built.stored[name].reshape(2, -1)
        want = of_experts[:, 0] if shared else of_experts[0]
        assert [scalars[name + key] for key in keys] == want.tolist()
        assert not [key for key in scalars if "down_proj" in key]

    def test_under_another_name_are_named_as_in_the_file(self, tmp_path: Path) -> None:
        """llm-compressor 0.14 names Mixtral's experts after the dense layer."""

        def rename(stored: dict[str, Tensor]) -> None:
            for name in [name for name in stored if ".w1." in name]:
                stored[name.replace(".w1.", ".gate_proj.")] = stored.pop(name)

        write_checkpoint(tmp_path, config=tiny_config("MixtralForCausalLM", **SIZES), scheme="nvfp4", edit=rename)

        found = {name for name in open_checkpoint(tmp_path).probe.scalars if ".experts.1." in name}

        experts = "model.layers.0.block_sparse_moe.experts.1"
        kinds = ("weight_global_scale", "input_global_scale")
        assert found == {f"{experts}.{leaf}.{kind}" for leaf in ("gate_proj", "w3") for kind in kinds}


def test_mistrals_own_form_is_named_as_in_the_file(tmp_path: Path) -> None:
    config = tiny_config("MistralForCausalLM", layers=1)
    write_native(tmp_path, "nvfp4", config=config)

    found = {name for name in open_checkpoint(tmp_path).probe.scalars if name.endswith("weight_global_scale")}

    leaves = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3")
    assert found == {f"layers.0.{leaf}.weight_global_scale" for leaf in leaves}


def test_targets_of_a_multimodal_model_may_have_another_prefix(tmp_path: Path) -> None:
    """If two groups fit the tensors, the target decides."""

    def place(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.startswith("model.")]:
            stored[name.replace("model.", "model.language_model.", 1)] = stored.pop(name)

    def nest(document: dict[str, Any]) -> None:
        nested = {key: document.pop(key) for key in list(document) if key not in {"quantization_config", "dtype"}}
        groups = document["quantization_config"]["config_groups"]
        groups["group_0"]["targets"] = [Q.replace("model.", "language_model.model.", 1)]
        groups["group_1"] = SCHEMES["int4-g32"].group | {"targets": ["elsewhere"]}
        document |= {"architectures": ["Wrapper"], "text_config": nested}

    def order(stored: dict[str, Tensor]) -> None:
        stored[f"{Q}.weight_g_idx"] = (torch.arange(128) // 64).to(torch.int32)

    config = tiny_config(hidden=128, kv_heads=4, intermediate=64, **SIZES)
    write_checkpoint(tmp_path, config=config, scheme={"q_proj": "int4-g64-actorder"}, edit=order)
    rewrite(tmp_path, place)
    rewrite_config(tmp_path, nest)

    name = Q.replace("model.", "model.language_model.", 1)
    assert open_checkpoint(tmp_path).probe == Probe(trivial=frozenset({f"{name}.weight_g_idx"}))


class TestSparse:
    CONFIG = LLAMA | {
        "quantization_config": quantization_block({})
        | {"sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"]}}
    }

    @pytest.mark.parametrize("scalars", [{}, {f"{Q}.weight_global_scale": 3.0}], ids=["alone", "beside others"])
    def test_shapes_are_the_numbers_in_the_pieces(self, tmp_path: Path, scalars: dict[str, float]) -> None:
        built = write_checkpoint(tmp_path, config=self.CONFIG, scheme="dense")
        beside = {name: torch.tensor([value]) for name, value in scalars.items()}
        save_compressed(built.stored | beside, tmp_path / FILE, "sparse-bitmask")

        shapes = {name.replace(".weight", ".shape"): tuple(tensor.shape) for name, tensor in built.stored.items()}
        assert open_checkpoint(tmp_path).probe == Probe(shapes=shapes, scalars=scalars)

    def test_a_sparse_scalar_is_not_read(self, tmp_path: Path) -> None:
        """Releases up to 0.8.1 compressed every tensor; headers then don't show the position of a value."""
        built = write_checkpoint(tmp_path, config=LLAMA, scheme="nvfp4")
        plain = {f"{Q}.weight_global_scale": built.stored.pop(f"{Q}.weight_global_scale")}
        save_compressed(built.stored, tmp_path / FILE, "sparse-bitmask", generation="0.4")
        rewrite(tmp_path, lambda stored: stored.update(plain))

        assert open_checkpoint(tmp_path).probe.scalars == {name: float(scalar) for name, scalar in plain.items()}

    def test_a_shape_that_was_read_decides_which_zero_points_are_read(self, tmp_path: Path) -> None:
        """Half of the words are 0 and not stored, so that the values alone would suggest fewer columns."""
        group = SCHEMES["int4-g32-asym"].group
        block = quantization_block({"group_0": group | {"weights": group["weights"] | {"symmetric": True}}})

        def compress(stored: dict[str, Tensor]) -> None:
            words = stored.pop(f"{Q}.weight_packed")
            words[:, ::2] = 0
            stored |= {f"{Q}.weight_packed.{piece}": tensor for piece, tensor in SPARSE_BITMASK.encode(words).items()}
            stored[f"{Q}.weight_zero_point"] = torch.zeros(64, 2, dtype=torch.int8)

        write_checkpoint(
            tmp_path,
            config=LLAMA | {"quantization_config": block},
            scheme={"q_proj": "int4-g32-asym"},
            edit=compress,
        )

        assert open_checkpoint(tmp_path).probe.zero == {f"{Q}.weight_zero_point"}
