"""Engine-build checkpoints compute the logits of their source: rotary embeddings, biases, norms, caches and ranks.

The source is computed by transformers from the exact weights of the builder of the tests, and the directory by a reader
that knows the format alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, write_checkpoint
from engine_files import EngineFiles
from engine_logits import cached, engine_logits, narrowed
from engine_sources import with_shared_globals
from fused_experts import fuse_experts
from installed_transformers import has_newest_transformers, typed_config
from tiny_models import tiny_config
from torch.nn.functional import scaled_dot_product_attention

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, "vocabulary": 97, "layers": 3}
PROMPT = torch.randint(0, 97, (48,), generator=torch.Generator().manual_seed(7))
BOUND = 2e-3
"""In standard deviations of the logits: docs/verification.md has it for exact weights."""
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 16}
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 16}
ROPES: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-attention": YARN | {"attention_factor": 1.4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "biases of queries, keys and values": ("Qwen2ForCausalLM", "int4-g64", {}),
    "biases in kernels": ("LlamaForCausalLM", "int4-g64", {"attention_bias": True, "mlp_bias": True}),
    "biases after the ranks": ("LlamaForCausalLM", "int8-channel", {"attention_bias": True, "mlp_bias": True}),
    "norms of heads": ("Qwen3ForCausalLM", "int4-g64", {}),
    "a tied head": ("LlamaForCausalLM", "fp8-channel-token", {"tied": True}),
    "another class": ("MistralForCausalLM", "w8a8", {}),
    "experts": ("MixtralForCausalLM", "dense", {"num_experts_per_tok": 3}),
}
RANKS = [Parallel(tensor=tensor, pipeline=pipeline) for tensor in (1, 2) for pipeline in (1, 2)]


def computed(built: Built, *, inputs: str | None = None, fused_mlp: bool = False, **changed: Tensor) -> Tensor:
    """The logits of the source at every position, by transformers in float32.

    `inputs` is the algorithm whose kernels narrow the inputs of Linears, with one scale for those that are fused.
    """
    from transformers import AutoModelForCausalLM

    fields = {key: value for key, value in built.config.items() if key not in {"architectures", "quantization_config"}}
    model_type = fields.pop("model_type")
    fields.pop("dtype")
    model = AutoModelForCausalLM.from_config(typed_config(model_type, **fields), attn_implementation="through_cache")
    weights = {name: tensor.float() for name, tensor in (built.dense | changed).items()}
    if built.config["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    if has_newest_transformers():  # it has the experts of a layer in one tensor
        weights = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in weights.items()}
        fuse_experts(weights)
    model.load_state_dict(weights)
    for layer, block in enumerate(model.model.layers):
        names = [f"model.layers.{layer}.self_attn.{letter}_scale" for letter in "kv"]
        scales = [built.stored[name].float() for name in names if name in built.stored]
        block.self_attn.cache_scale = max(scales) if scales else None
    scales = input_scales(built, fused_mlp=fused_mlp) if inputs else {}
    for name, scale in scales.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, given, scale=scale: (narrowed(given[0], inputs, scale),))
    with torch.no_grad():
        return model.float().eval()(PROMPT[None]).logits[0].float()


@pytest.fixture(autouse=True)
def _attention_through_the_cache() -> None:
    from transformers import AttentionInterface

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: object, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        scale, group = module.cache_scale, query.shape[1] // key.shape[1]
        key, value = (cached(part, scale if scale is None else "FP8", scale) for part in (key, value))
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register("through_cache", attention)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.std())


def converted(built: Built, out: Path, parallel: Parallel, *, fused_mlp: bool = True) -> EngineFiles:
    convert_checkpoint(built.directory, out, to="engine", parallel=parallel)
    files = EngineFiles(out, fused_mlp=fused_mlp)
    files.check_tensors()
    return files


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("old", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ROPES)
def test_every_rotary_embedding_gives_the_logits_of_the_source(
    name: str, old: bool, tensor: int, tmp_path: Path
) -> None:
    block = ROPES[name]
    rope = (
        {"rope_theta": 5000.0, "rope_scaling": block} if old else {"rope_parameters": {"rope_theta": 5000.0, **block}}
    )
    # Four times the original length, as the factor says: transformers before 4.55 takes this ratio for the factor.
    config = tiny_config(**SIZES, max_position_embeddings=4 * YARN[ORIGINAL], **{"rope_parameters": None, **rope})
    built = write_checkpoint(tmp_path / "source", config=config, scheme="dense")
    files = converted(built, tmp_path / "out", Parallel(tensor=tensor))

    want = computed(built)
    assert distance(engine_logits(files, PROMPT), want) < BOUND

    if files.config["rotary_scaling"] is not None:
        files.config["rotary_scaling"] = None
        assert distance(engine_logits(files, PROMPT), want) > 10 * BOUND


@pytest.mark.parametrize("parallel", RANKS, ids=lambda sizes: f"tp{sizes.tensor}-pp{sizes.pipeline}")
@pytest.mark.parametrize("name", MODELS)
def test_every_part_of_a_layer_gives_the_logits_of_the_source(name: str, parallel: Parallel, tmp_path: Path) -> None:
    architecture, scheme, more = MODELS[name]
    built = write_checkpoint(tmp_path / "source", config=tiny_config(architecture, **SIZES, **more), scheme=scheme)

    files = converted(built, tmp_path / "out", parallel)

    assert distance(engine_logits(files, PROMPT), computed(built)) < BOUND


class TestExperts:
    """Mixtral: experts are dense tensors whatever the source has, so quantized ones are rounded once to bfloat16."""

    CONFIG = tiny_config("MixtralForCausalLM", **SIZES | {"intermediate": 128})

    @pytest.mark.parametrize("tensor", [1, 2])
    @pytest.mark.parametrize("scheme", ["int4-g64", "int4-g32-asym", "fp8-tensor-static", "fp8-block", "nvfp4"])
    def test_they_give_the_logits_of_the_rounded_source(self, scheme: str, tensor: int, tmp_path: Path) -> None:
        built = write_checkpoint(tmp_path / "source", config=self.CONFIG, scheme=scheme)
        files = converted(built, tmp_path / "out", Parallel(tensor=tensor))

        rounded = {name: weight.bfloat16() for name, weight in built.dense.items()}
        assert distance(engine_logits(files, PROMPT), computed(built, **rounded)) < BOUND

    @pytest.mark.parametrize(
        "damage",
        [
            lambda files: files.config["moe"].update(top_k=1),
            lambda files: _edit(files, "mlp.router", lambda router: router.roll(1, 0)),
            lambda files: _edit(files, "mlp.fc", lambda fc: torch.cat(fc.chunk(2, dim=1)[::-1], dim=1)),
            lambda files: _edit(files, "mlp.proj", lambda proj: proj.roll(1, 0)),
            lambda files: _edit(files, "mlp.proj", torch.zeros_like, slice(1)),
        ],
        ids=["fewer experts", "another router", "gate before up", "another expert", "one rank less"],
    )
    def test_each_of_these_counts(self, damage: Callable[[EngineFiles], object], tmp_path: Path) -> None:
        built = write_checkpoint(tmp_path / "source", config=self.CONFIG, scheme="dense")
        files = converted(built, tmp_path / "out", Parallel(tensor=2))

        damage(files)

        assert distance(engine_logits(files, PROMPT), computed(built)) > 10 * BOUND


def _edit(files: EngineFiles, name: str, change: Callable[[Tensor], Tensor], ranks: slice = slice(None)) -> None:
    """Change the weights of a module in every layer of some ranks."""
    for tensors in files.files[ranks]:
        for key in [key for key in tensors if key.endswith(f".{name}.weight")]:
            tensors[key] = change(tensors[key])


@pytest.mark.parametrize(("scheme", "algo"), [("w8a8-static", "W8A8_SQ_PER_CHANNEL"), ("nvfp4", "NVFP4")])
@pytest.mark.parametrize("tensor", [1, 2])
def test_static_scales_of_inputs_count(scheme: str, algo: str, tensor: int, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "source", config=tiny_config(**SIZES), scheme=scheme, edit=with_shared_globals)
    files = converted(built, tmp_path / "out", Parallel(tensor=tensor))

    want = computed(built, inputs=algo)

    assert distance(engine_logits(files, PROMPT), want) < TestFp8.BOUND
    for tensors in files.files:
        for name in tensors:
            if name.endswith("activation_scaling_factor"):
                tensors[name].mul_(64)
    assert distance(engine_logits(files, PROMPT), want) > TestFp8.BOUND


class TestFp8:
    """Static FP8 with a cache in FP8: q, k and v have one scale, and so have gate and up that the builder joins.

    The order of sums decides about keys and values on the border between two numbers of FP8, so the bound is that of
    rounded weights in docs/verification.md.
    """

    BOUND = 2e-2

    @pytest.mark.parametrize("fused_mlp", [True, False])
    @pytest.mark.parametrize("parallel", RANKS, ids=lambda sizes: f"tp{sizes.tensor}-pp{sizes.pipeline}")
    def test_its_logits_are_those_of_the_requantized_source(
        self, parallel: Parallel, fused_mlp: bool, tmp_path: Path
    ) -> None:
        built = write_checkpoint(tmp_path / "source", config=tiny_config(**SIZES), scheme="fp8-tensor-static", kv=True)
        files = converted(built, tmp_path / "out", parallel, fused_mlp=fused_mlp)

        want = computed(built, inputs="FP8", fused_mlp=fused_mlp, **requantized(built, fused_mlp=fused_mlp))

        assert distance(engine_logits(files, PROMPT), want) < self.BOUND

    @pytest.mark.parametrize(
        "damage",
        [
            lambda files: setattr(files, "cache", None),
            lambda files: [tensors[name].div_(64) for tensors in files.files for name in tensors if "kv_cache" in name],
            lambda files: setattr(files, "fused_mlp", False),
            lambda files: [
                tensors[name].mul_(64) for tensors in files.files for name in tensors if "activation_scaling" in name
            ],
        ],
        ids=["no cache", "another scale", "gate and up apart", "another scale of inputs"],
    )
    def test_each_of_these_counts(self, damage: Callable[[EngineFiles], object], tmp_path: Path) -> None:
        """What the comparison above would find."""
        built = write_checkpoint(tmp_path / "source", config=tiny_config(**SIZES), scheme="fp8-tensor-static", kv=True)
        files = converted(built, tmp_path / "out", Parallel(tensor=2))

        damage(files)

        want = computed(built, inputs="FP8", fused_mlp=True, **requantized(built, fused_mlp=True))
        assert distance(engine_logits(files, PROMPT), want) > self.BOUND


def input_scales(built: Built, *, fused_mlp: bool) -> dict[str, Tensor]:
    """The multiplier of each Linear's input: the largest of those of fused ones; NVFP4 stores the divisor."""
    groups = [("q_proj", "k_proj", "v_proj"), *([("gate_proj", "up_proj")] if fused_mlp else [])]
    own = {
        name.rpartition(".")[0]: 1 / tensor.float() if name.endswith("global_scale") else tensor.float()
        for name, tensor in built.stored.items()
        if name.endswith((".input_scale", ".input_global_scale"))
    }
    scales = {}
    for name in own:
        block, _, leaf = name.rpartition(".")
        members = next((group for group in groups if leaf in group), (leaf,))
        scales[name] = max(own[f"{block}.{member}"].reshape(()) for member in members)
    return scales


def requantized(built: Built, *, fused_mlp: bool) -> dict[str, Tensor]:
    """The weights that come under one scale: codes are multiplied by their scale and divided by the largest."""
    groups = [("q_proj", "k_proj", "v_proj")] + ([("gate_proj", "up_proj")] if fused_mlp else [])
    changed = {}
    for layer in range(SIZES["layers"]):
        for group in groups:
            block = "self_attn" if "q_proj" in group else "mlp"
            names = [f"model.layers.{layer}.{block}.{leaf}" for leaf in group]
            scales = [built.stored[f"{name}.weight_scale"].float().reshape(()) for name in names]
            for name, scale in zip(names, scales, strict=True):
                codes = (built.stored[f"{name}.weight"].float() * scale / max(scales)).to(torch.float8_e4m3fn)
                changed[f"{name}.weight"] = codes.double() * max(scales).double()
    return changed
