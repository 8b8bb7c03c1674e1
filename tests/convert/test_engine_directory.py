"""Target `engine`: the files of the ranks hold what the loader of the TensorRT backend needs, and nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, write_checkpoint
from engine_files import QUANTIZATION_KEYS, EngineFiles
from engine_sources import with_shared_globals
from safetensors.torch import load_file
from tiny_models import tiny_config

from trtllm_ct.base.errors import PayloadError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocabulary": 97, "layers": 3}
"""Three layers and 97 words divide by no parallel size."""
FOUR = Parallel(tensor=4)
TWO_BY_TWO = Parallel(tensor=2, pipeline=2)
ALGOS = {
    "dense": None,
    "int4-g128": "W4A16_AWQ",
    "int4-g64": "W4A16_AWQ",
    "int4-g256": "W4A16_AWQ",
    "int4-channel": "W4A16_AWQ",
    "int4-plain-g64": "W4A16_AWQ",
    "int3-g64": "W4A16_AWQ",
    "int4-g64-asym": "W4A16_AWQ",
    "int4-channel-asym": "W4A16_AWQ",
    "fp8-channel-token": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8-tensor-token": "FP8_PER_CHANNEL_PER_TOKEN",
    "w8a8": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    "w8a8-static": "W8A8_SQ_PER_CHANNEL",
    "int8-channel": "W8A16",
    "int8-plain-tensor": "W8A16",
    "nvfp4": "NVFP4",
}
FUSED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def config(architecture: str = "LlamaForCausalLM", **more: Any) -> dict[str, Any]:
    return tiny_config(architecture, **SIZES, **more)


def converted(built: Built, out: Path, parallel: Parallel = FOUR, **options: Any) -> EngineFiles:
    convert_checkpoint(built.directory, out, to="engine", parallel=parallel, **options)
    files = EngineFiles(out)
    files.check_tensors()
    return files


def assert_exact(files: EngineFiles, dense: dict[str, Tensor], leaves: tuple[str, ...] = ()) -> None:
    """Every weight is the one of the source, but for rounded zeros; `leaves` are not compared."""
    weights, zeros = files.weights(), files.zeros() if files.quantization["has_zero_point"] else {}
    assert weights.keys() == dense.keys()
    for name, want in dense.items():
        if name.endswith(leaves or ("-",)):
            continue
        # bfloat16 has 8 significant bits: rounding changes a number by at most 2^-8 of it.
        bound = 1e-6 * want.abs().amax(-1, keepdim=True) + (zeros[name] * 2**-8 * (1 + 2**-7) if name in zeros else 0)
        assert bool(((weights[name] - want).abs() <= bound).all()), name


@pytest.mark.parametrize("scheme", [scheme for scheme in ALGOS if scheme != "nvfp4"])
def test_every_algorithm_holds_the_weights_of_the_source_exactly(scheme: str, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme=scheme)
    for parallel in (FOUR, TWO_BY_TWO):
        files = converted(built, tmp_path / f"out{parallel.pipeline}", parallel)
        assert files.algo == ALGOS[scheme]
        assert_exact(files, built.dense)


COMMON = {
    "producer", "architecture", "dtype", "logits_dtype", "vocab_size", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_size", "intermediate_size", "hidden_act", "norm_epsilon",
    "position_embedding_type", "max_position_embeddings", "rotary_base", "rotary_scaling", "use_parallel_embedding",
    "embedding_sharding_dim", "tie_word_embeddings", "disable_weight_only_quant_plugin", "quantization", "mapping",
    "attn_bias", "mlp_bias",
}  # fmt: skip
QWEN = {
    "qwen_type", "seq_length", "use_logn_attn", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "mlp_only_layers", "decoder_sparse_step", "num_labels",
}  # fmt: skip
KEYS = {
    "LlamaForCausalLM": COMMON,
    "MistralForCausalLM": COMMON,
    "MixtralForCausalLM": COMMON | {"moe"},
    "Qwen2ForCausalLM": COMMON | QWEN,
    "Qwen3ForCausalLM": COMMON | QWEN,
}
"""The keys of config.json that the description of the format has for each class."""


@pytest.mark.parametrize("architecture", KEYS)
def test_the_directory_for_two_ranks_has_every_key_and_tensor_and_no_other(architecture: str, tmp_path: Path) -> None:
    scheme = "dense" if architecture == "MixtralForCausalLM" else "int4-g64"
    built = write_checkpoint(tmp_path / "source", config=config(architecture), scheme=scheme)

    files = converted(built, tmp_path / "out", Parallel(tensor=2))

    experts = {"moe_tp_size", "moe_ep_size"} if architecture == "MixtralForCausalLM" else set()
    assert files.config.keys() == KEYS[architecture]
    assert files.quantization.keys() == QUANTIZATION_KEYS
    assert files.config["mapping"].keys() == {"world_size", "tp_size", "pp_size"} | experts
    assert {key for key, value in files.config.items() if value is None} == {"rotary_scaling"}
    layers = {name.removeprefix("transformer.layers.") for name in files.files[1] if ".layers." in name}
    assert {int(name.partition(".")[0]) for name in layers} == {0, 1, 2}
    norms = {"input_layernorm.weight", "post_layernorm.weight"}
    linears = ["attention.qkv", "attention.dense"]
    mlp = ["mlp.fc", "mlp.proj", "mlp.router"] if experts else ["mlp.fc", "mlp.gate", "mlp.proj"]
    locals_ = ["weight"] if experts else ["weight", "weights_scaling_factor", "prequant_scaling_factor"]
    heads = {"attention.q_layernorm.weight", "attention.k_layernorm.weight"} if "Qwen3" in architecture else set()
    biases = {"attention.qkv.bias"} if "Qwen2" in architecture else set()
    one_layer = norms | heads | biases | {f"{linear}.{local}" for linear in linears + mlp for local in locals_}
    assert layers == {f"{layer}.{name}" for layer in range(3) for name in one_layer}
    outside = {name for name in files.files[1] if ".layers." not in name}
    assert outside == {"transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"}


def test_nvfp4_keeps_codes_and_block_scales(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme="nvfp4", edit=with_shared_globals)
    stored = built.stored["model.layers.0.mlp.down_proj.weight_packed"]

    files = converted(built, tmp_path / "out", Parallel(tensor=2))

    halves = [part["transformer.layers.0.mlp.proj.weight"] for part in files.files]
    assert torch.equal(torch.cat(halves, dim=1), stored)
    scale = files.files[1]["transformer.layers.2.attention.qkv.weights_scaling_factor_2"]
    assert scale.item() == pytest.approx(1 / built.stored["model.layers.0.mlp.up_proj.weight_global_scale"].item())


class TestFp8:
    @staticmethod
    def scales(built: Built, layer: int, local: str) -> list[Tensor]:
        prefix = f"model.layers.{layer}.self_attn."
        return [built.stored[f"{prefix}{letter}_proj.{local}"].float().reshape(()) for letter in "qkv"]

    def test_q_k_and_v_are_requantized_to_the_largest_scale(self, tmp_path: Path) -> None:
        built = write_checkpoint(tmp_path / "source", config=config(), scheme="fp8-tensor-static", kv=True)

        files = converted(built, tmp_path / "out", Parallel(tensor=2))

        assert_exact(files, built.dense, FUSED)
        weights = files.weights()
        for layer in range(3):
            scales = self.scales(built, layer, "weight_scale")
            for letter, scale in zip("qkv", scales, strict=True):
                name = f"model.layers.{layer}.self_attn.{letter}_proj.weight"
                codes = built.stored[name].float() * scale / max(scales)
                want = codes.to(torch.float8_e4m3fn).double() * max(scales).double()
                assert torch.equal(weights[name], want)
            qkv = f"transformer.layers.{layer}.attention.qkv.activation_scaling_factor"
            assert files.files[0][qkv].item() == max(self.scales(built, layer, "input_scale")).item()

    def test_equal_scales_keep_every_byte(self, tmp_path: Path) -> None:
        def equal_scales(stored: dict[str, Tensor]) -> None:
            for name in [name for name in stored if name.endswith("proj.weight_scale")]:
                stored[name] = torch.full_like(stored[name], 0.01)

        built = write_checkpoint(tmp_path / "source", config=config(), scheme="fp8-tensor-static", edit=equal_scales)

        files = converted(built, tmp_path / "out", Parallel())

        qkv = files.files[0]["transformer.layers.1.attention.qkv.weight"]
        parts = [built.stored[f"model.layers.1.self_attn.{letter}_proj.weight"] for letter in "qkv"]
        assert torch.equal(qkv.view(torch.uint8), torch.cat([part.view(torch.uint8) for part in parts]))

    @pytest.mark.parametrize("equal", [True, False])
    def test_gate_and_up_that_the_builder_joins_are_requantized_unless_their_scales_are_equal(
        self, equal: bool, tmp_path: Path
    ) -> None:
        def equal_scales(stored: dict[str, Tensor]) -> None:
            for name in [name for name in stored if name.endswith("up_proj.weight_scale")]:
                stored[name] = stored[name.replace("up_proj", "gate_proj")].clone()

        built = write_checkpoint(
            tmp_path / "source",
            config=config(),
            scheme="fp8-tensor-static",
            edit=equal_scales if equal else None,
        )
        files = converted(built, tmp_path / "out", TWO_BY_TWO)
        apart = files.weights()
        files.fused_mlp = True

        joined = files.weights()

        changed = {name for name in apart if not torch.equal(apart[name], joined[name])}
        leaves = {name.rpartition(".")[0].rpartition(".")[2] for name in changed}
        assert leaves == (set() if equal else {"gate_proj", "up_proj"} & leaves)
        assert len(changed) == (0 if equal else 3)  # one of the two in each layer has the smaller scale

    def test_the_cache_has_the_larger_scale_of_keys_and_values_on_every_rank(self, tmp_path: Path) -> None:
        built = write_checkpoint(tmp_path / "source", config=config(), scheme="fp8-tensor-static", kv=True)

        files = converted(built, tmp_path / "out", TWO_BY_TWO)

        assert files.quantization["kv_cache_quant_algo"] == "FP8"
        for layer, rank, local in ((0, 0, 0), (1, 1, 1), (2, 2, 0), (2, 3, 0)):
            scales = [built.stored[f"model.layers.{layer}.self_attn.{letter}_scale"].float() for letter in "kv"]
            name = f"transformer.layers.{local}.attention.kv_cache_scaling_factor"
            assert files.files[rank][name].item() == max(scales).item()


def test_an_int8_cache_is_named_int8(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme="dense", kv=True)
    path = built.directory / "config.json"
    document = json.loads(path.read_text())
    document["quantization_config"]["kv_cache_scheme"] |= {"type": "int"}
    path.write_text(json.dumps(document))

    files = converted(built, tmp_path / "out", Parallel(tensor=2))

    assert (files.algo, files.quantization["kv_cache_quant_algo"]) == (None, "INT8")


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("MistralForCausalLM", {}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
        ("MixtralForCausalLM", {}),
        ("LlamaForCausalLM", {"tied": True}),
    ],
)
@pytest.mark.parametrize("parallel", [Parallel(), FOUR, TWO_BY_TWO], ids=str)
def test_every_class_has_its_names_biases_and_norms(
    architecture: str, more: dict[str, Any], parallel: Parallel, tmp_path: Path
) -> None:
    scheme = "dense" if architecture == "MixtralForCausalLM" else "int4-g64"
    built = write_checkpoint(tmp_path / "source", config=config(architecture, **more), scheme=scheme)

    files = converted(built, tmp_path / "out", parallel)

    head = {"lm_head.weight": built.dense["model.embed_tokens.weight"]} if more.get("tied") else {}
    assert_exact(files, built.dense | head)


def test_a_bias_of_a_groupwise_linear_is_on_every_rank_and_the_loader_keeps_one(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(attention_bias=True), scheme="int4-g64")

    files = converted(built, tmp_path / "out", Parallel(tensor=2))

    name = "transformer.layers.0.attention.dense"
    biases = [part[f"{name}.bias"] for part in files.files]
    assert torch.equal(biases[0], biases[1])
    added = [files.linear(rank, name).bias for rank in (0, 1)]
    assert torch.equal(torch.stack(added).sum(dim=0), built.stored["model.layers.0.self_attn.o_proj.bias"])


@pytest.mark.parametrize("scheme", ["int8-channel", "fp8-channel-token", "w8a8-static", "w8a8", "dense"])
def test_a_bias_of_other_linears_is_added_once_after_the_ranks_are_added_up(scheme: str, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(attention_bias=True, mlp_bias=True), scheme=scheme)

    assert_exact(converted(built, tmp_path / "out", Parallel(tensor=2)), built.dense)


def test_the_head_is_padded_with_zeros_and_the_last_rank_may_have_nothing_else(tmp_path: Path) -> None:
    small = tiny_config(**{**SIZES, "vocabulary": 5})
    built = write_checkpoint(tmp_path / "source", config=small, scheme="dense")

    files = converted(built, tmp_path / "out", FOUR)

    heads = [part["lm_head.weight"] for part in files.files]
    assert files.config["vocab_size"] == 5
    assert [head.shape[0] for head in heads] == [2, 2, 2, 2]
    assert not heads[3].any()
    assert torch.equal(torch.cat(heads)[:5], built.stored["lm_head.weight"])


def test_linears_that_stay_plain_are_excluded_by_the_names_of_the_engine(tmp_path: Path) -> None:
    scheme = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "int4-g64")
    built = write_checkpoint(tmp_path / "source", config=config(), scheme=scheme)

    files = converted(built, tmp_path / "out", Parallel(tensor=2))

    layers = [f"transformer.layers.{layer}.{name}*" for layer in range(3) for name in ("attention.dense", "mlp.proj")]
    assert files.quantization["exclude_modules"] == ["lm_head", "*router", "transformer.vocab_embedding", *layers]
    assert_exact(files, built.dense)


@pytest.mark.parametrize("scheme", ["int8-channel", "fp8-tensor-static", "w8a8-static"])
def test_the_loader_leaves_plain_linears_alone(scheme: str, tmp_path: Path) -> None:
    """It looks for what is excluded by the name of the Linear, and for weight-only modes by that of the tensor."""
    quantized = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), scheme)
    built = write_checkpoint(tmp_path / "source", config=config(), scheme=quantized)

    files = converted(built, tmp_path / "out", Parallel(tensor=2))

    assert files.excluded("transformer.layers.0.mlp.gate")
    assert files.excluded("transformer.layers.0.mlp.fc")
    assert not files.excluded("transformer.layers.0.mlp.proj")
    assert_exact(files, built.dense, FUSED if scheme == "fp8-tensor-static" else ())


def test_parts_of_a_fused_linear_are_plain_together(tmp_path: Path) -> None:
    scheme = dict.fromkeys(("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "int4-g64")
    built = write_checkpoint(tmp_path / "source", config=config(), scheme=scheme)

    files = converted(built, tmp_path / "out", Parallel())

    assert files.excluded("transformer.layers.2.attention.qkv")
    rounded = {
        name: tensor.bfloat16().double() for name, tensor in built.dense.items() if name.endswith("q_proj.weight")
    }
    assert_exact(files, built.dense | rounded)


def test_the_embedding_is_whole_on_every_rank_of_the_first_stage_only(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme="dense")

    files = converted(built, tmp_path / "out", TWO_BY_TWO)

    tables = ["transformer.vocab_embedding.weight" in part for part in files.files]
    heads = ["lm_head.weight" in part for part in files.files]
    assert (tables, heads) == ([True, True, False, False], [False, False, True, True])


def test_nothing_but_configuration_and_ranks_is_written(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme="int4-g64", tokenizer=True)

    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=TWO_BY_TWO)

    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".trtllm_ct.json", "config.json", *(f"rank{rank}.safetensors" for rank in range(4))]


@pytest.mark.parametrize(
    "scheme", ["dense", "int4-g64", "int4-g64-asym", "int8-channel", "fp8-tensor-static", "w8a8", "nvfp4"]
)
def test_the_bytes_do_not_depend_on_the_size_of_tiles(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(tied=True), scheme=scheme)
    convert_checkpoint(built.directory, tmp_path / "whole", to="engine", parallel=TWO_BY_TWO)
    monkeypatch.setattr("trtllm_ct.convert.tiles.TILE_BYTES", 1 << 13)
    convert_checkpoint(built.directory, tmp_path / "tiled", to="engine", parallel=TWO_BY_TWO)

    for rank in range(4):
        file = f"rank{rank}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "tiled" / file).read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(workers: int, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme="int8-channel")
    for name, count in (("one", 1), ("other", workers)):
        convert_checkpoint(built.directory, tmp_path / name, to="engine", parallel=Parallel(tensor=2), workers=count)

    for rank in range(2):
        file = f"rank{rank}.safetensors"
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


@pytest.mark.parametrize("scheme", ["int4-g64", "int4-g64-asym", "int8-channel"])
def test_a_scale_that_float16_makes_zero_is_refused(scheme: str, tmp_path: Path) -> None:
    """The loader casts scales of int4 weights, and would build an engine with rows of zeros."""

    def tiny_scale(stored: dict[str, Tensor]) -> None:
        stored["model.layers.1.mlp.up_proj.weight_scale"][3] = 1e-9

    built = write_checkpoint(tmp_path / "source", config=config(), scheme=scheme, edit=tiny_scale)

    with pytest.raises(PayloadError, match="become zero"):
        convert_checkpoint(built.directory, tmp_path / "out", to="engine", dtype="float16")
    convert_checkpoint(built.directory, tmp_path / "out", to="engine")


def test_float16_applies_to_every_plain_tensor(tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=config(), scheme="int4-g64")

    files = converted(built, tmp_path / "out", Parallel(), dtype="float16")

    assert files.config["dtype"] == "float16"
    plain = load_file(tmp_path / "out" / "rank0.safetensors")
    assert plain["transformer.layers.0.input_layernorm.weight"].dtype == torch.float16


@pytest.mark.parametrize("parallel", [Parallel(), FOUR], ids=str)
@pytest.mark.parametrize("fused_mlp", [False, True])
@pytest.mark.parametrize("scheme", ["fp8-tensor-static", "w8a8-static", "nvfp4"])
def test_each_linear_has_the_input_scale_of_the_source(
    scheme: str, fused_mlp: bool, parallel: Parallel, tmp_path: Path
) -> None:
    """As a multiplier, the largest of those of q, k and v; NVFP4 stores its inverse."""

    def edit(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.endswith("weight_global_scale")]:
            stored[name] = torch.full_like(stored[name], 512.0)
        for number, name in enumerate(name for name in stored if name.endswith(("input_scale", "input_global_scale"))):
            stored[name] = torch.full_like(stored[name], 2.0 ** (number % 5 - 3))

    built = write_checkpoint(tmp_path / "source", config=config(), scheme=scheme, edit=edit)
    convert_checkpoint(built.directory, tmp_path / "out", to="engine", parallel=parallel)

    scales = EngineFiles(tmp_path / "out", fused_mlp=fused_mlp).input_scales()

    own = {}
    for name, tensor in built.stored.items():
        module, _, local = name.rpartition(".")
        if local in {"input_scale", "input_global_scale"}:
            own[module] = 1 / float(tensor) if local == "input_global_scale" else float(tensor)
    fused = [("q_proj", "k_proj", "v_proj"), *([("gate_proj", "up_proj")] if fused_mlp and "fp8" in scheme else [])]
    assert scales.keys() == own.keys()
    for name, scale in scales.items():
        block, _, leaf = name.rpartition(".")
        members = next((group for group in fused if leaf in group), (leaf,))
        assert scale == max(own[f"{block}.{member}"] for member in members), name
