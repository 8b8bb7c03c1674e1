"""The plan as a whole: every stored tensor accounted for, all faults together, nothing guessed."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import SCHEMES, Built, config_group, int_weights, rewrite, rewrite_config, tiny_config, write_checkpoint
from on_tensors import on_tensors, stream_delivered
from stored_schemes import Writer
from torch import Tensor

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import Fault, PlanError
from trtllm_ct.engine.target import TARGETS
from trtllm_ct.layouts import rounding as rounding_layout
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
from trtllm_ct.plan.plan import Fate, Plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

round_once = on_tensors(rounding_layout.round_once)

LAYER = "model.layers.0"
Q, O, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"  # noqa: E741
ALL = {
    **{name: name for name in SCHEMES},
    "dense": "dense",
    "mixed": {"o_proj": "int4-g64-asym", "down_proj": "fp8-tensor-static", "gate_proj": "int8-g32", "up_proj": "dense"},
}


@pytest.fixture(scope="module", params=ALL)
def of_every_scheme(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A checkpoint with biases and KV scales in two shards, and with everything that a plan may ignore."""

    def add_ignored(stored: dict[str, Tensor]) -> None:
        stored[f"{LAYER}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        stored["model.norm.weight_scale"] = torch.ones(1)
        stored[f"{LAYER}.self_attn.k_zero_point"] = torch.zeros(1, dtype=torch.int8)
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        if request.param in {"int4-g64", "mixed"}:
            stored[f"{O}.input_scale"] = torch.ones(1)

    config = tiny_config("Qwen2ForCausalLM", hidden=256, intermediate=256, vocabulary=64, layers=1, tied=True)
    directory = tmp_path_factory.mktemp(request.param)
    return write_checkpoint(directory, config=config, scheme=ALL[request.param], kv=True, shards=2, edit=add_ignored)


def faults(directory: Path, to: str = "modelopt", **options: Any) -> dict[str, Fault]:
    with pytest.raises(PlanError) as caught:
        plan_checkpoint(directory, to, **options)
    found = {fault.where: fault for fault in caught.value.faults}
    assert len(found) == len(caught.value.faults)
    return found


@pytest.fixture(scope="module")
def plans(of_every_scheme: Built) -> list[Plan]:
    """Its plans for every target that holds all schemes together, with the model's dtype and with float16."""
    return [
        plan_checkpoint(of_every_scheme.directory, to, dtype=dtype)
        for to, target in TARGETS.items()
        for dtype in (None, DType.F16)
        if not target.ranks  # an engine has one mode
    ]


class TestLaws:
    def test_every_stored_tensor_has_exactly_one_fate(self, of_every_scheme: Built, plans: list[Plan]):
        stored = {name: (tensor.dtype, tensor.shape) for name, tensor in of_every_scheme.stored.items()}
        for plan in plans:
            delivered = set(plan.delivered_specs)
            assert Counter(fate.name for fate in plan.fates()) == Counter(stored.keys())
            for fate in plan.fates():
                assert (fate.spec.dtype.torch_dtype, fate.spec.shape) == stored[fate.name]
                assert bool(fate.by) == (fate.fate is not Fate.IGNORED) == (not fate.reason)
                assert set(fate.by) <= delivered

    def test_every_delivered_tensor_is_made_once_from_what_is_read(self, plans: list[Plan]):
        for plan in plans:
            assert set(Counter(delivery.name for delivery in plan.deliveries()).values()) == {1}
            for module in plan.modules:
                assert {source for delivery in module.deliveries for source in delivery.sources} == set(module.reads)

    def test_no_quantized_tensor_is_delivered_without_its_companions(self, plans: list[Plan]):
        """Where the weight is consumed, so are its scale, its zero point and its shape."""
        companions = {"weight_scale", "weight_zero_point", "weight_shape"}
        for module in (module for plan in plans for module in plan.modules if module.weight is not None):
            assert companions & module.views.keys() <= {name.rpartition(".")[2] for name in module.reads}

    def test_bytes_add_up_and_the_plan_is_json(self, of_every_scheme: Built, plans: list[Plan]):
        for plan in plans:
            document = json.loads(json.dumps(plan.to_dict()))
            assert plan.stored_bytes == sum(tensor.nbytes for tensor in of_every_scheme.stored.values())
            assert plan.delivered_bytes == sum(spec.nbytes for spec in plan.delivered_specs.values())
            assert [entry["name"] for entry in document["delivered"]] == list(plan.delivered_specs)
            assert {entry["name"] for entry in document["stored"]} == of_every_scheme.stored.keys()
            assert document["modules"][0]["name"] == plan.modules[0].name == "model.embed_tokens"

    def test_fused_modules_get_one_mode(self, plans: list[Plan]):
        for plan in plans:
            for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                assert len({mod.layer for mod in plan.modules if mod.name.rpartition(".")[2] in names}) == 1

    def test_a_dequantized_module_has_a_reason(self, plans: list[Plan]):
        assert all(module.reason for plan in plans for module in plan.modules if module.dequantized)


class TestIgnored:
    """Tensors that nothing is made of, each for a reason."""

    @staticmethod
    def fate(plan: Plan, name: str) -> tuple[Fate, str]:
        (found,) = [fate for fate in plan.fates() if fate.name == name]
        return found.fate, found.reason

    def test_a_scale_beside_a_plain_weight_is_never_applied(self, tmp_path: Path):
        """A fake-quantized save: format dense, status frozen, float weights and their scales."""
        stray = {
            f"{Q}.weight_scale": torch.full((64, 1), 0.5),
            f"{Q}.weight_zero_point": torch.zeros(64, 1, dtype=torch.int8),
            f"{Q}.input_scale": torch.ones(1),
        }
        block = {"config_groups": {"group_0": config_group(int_weights(8, "channel"))}, "format": "dense"}
        config = tiny_config(quantization_config={"quant_method": "compressed-tensors", **block})
        write_checkpoint(tmp_path, config=config, scheme="dense", edit=lambda stored: stored.update(stray))

        plan = plan_checkpoint(tmp_path)

        reason = "the weight beside it is plain; applying the scale would corrupt it"
        assert {self.fate(plan, name) for name in stray} == {(Fate.IGNORED, reason)}
        assert self.fate(plan, f"{Q}.weight") == (Fate.COPIED, "")
        assert plan.module(Q).delivered_mode == "plain"

    def test_rotary_frequencies_are_recomputed_by_every_engine(self, tmp_path: Path):
        name = f"{LAYER}.self_attn.rotary_emb.inv_freq"
        write_checkpoint(tmp_path, edit=lambda stored: stored.update({name: torch.ones(8)}))

        assert self.fate(plan_checkpoint(tmp_path), name) == (
            Fate.IGNORED,
            "recomputed from config.json by every engine",
        )

    @pytest.mark.parametrize("local", ["inv_freq", "original_inv_freq", "full_attention_inv_freq", "cos_cached"])
    def test_other_classes_recompute_them_too(self, tmp_path: Path, local: str):
        names = [f"model.rotary_emb.{local}", "model.rotary_emb.alpha"]
        config = tiny_config() | {"architectures": ["OtherForCausalLM"], "model_type": "other"}
        stray = {name: torch.ones(8) for name in names}
        write_checkpoint(tmp_path, config=config, edit=lambda stored: stored.update(stray))

        plan = plan_checkpoint(tmp_path, "dense")

        assert self.fate(plan, names[0]) == (Fate.IGNORED, "recomputed from config.json by every engine")
        assert self.fate(plan, names[1]) == (Fate.COPIED, "")

    def test_a_class_without_learned_frequencies_is_given_none(self, tmp_path: Path):
        name = f"{LAYER}.self_attn.rotary_emb.alpha"
        write_checkpoint(tmp_path, edit=lambda stored: stored.update({name: torch.ones(8)}))

        assert faults(tmp_path).keys() == {name}

    def test_a_tied_lm_head_that_equals_the_embeddings_is_ignored(self, tmp_path: Path):
        def add(stored: dict[str, Tensor]) -> None:
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()

        write_checkpoint(tmp_path, config=tiny_config(tied=True), edit=add)

        plan = plan_checkpoint(tmp_path)

        reason = "it equals the embeddings, to which config.json ties it"
        assert self.fate(plan, "lm_head.weight") == (Fate.IGNORED, reason)
        assert "lm_head.weight" not in plan.delivered_specs

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            (f"{LAYER}.self_attn.q_scale", "engines don't quantize queries"),
            (f"{LAYER}.self_attn.q_zero_point", "engines don't quantize queries"),
            (f"{Q}.output_scale", "engines leave outputs unquantized"),
            (f"{Q}.output_zero_point", "engines leave outputs unquantized"),
        ],
    )
    def test_scales_of_queries_and_outputs(self, tmp_path: Path, name: str, reason: str):
        write_checkpoint(tmp_path, edit=lambda stored: stored.update({name: torch.ones(1)}))

        assert self.fate(plan_checkpoint(tmp_path), name) == (Fate.IGNORED, reason)

    @pytest.mark.parametrize(
        ("scheme", "reason"),
        [
            ("int4-g64", "W4A16_AWQ computes on 16-bit activations"),
            ("fp8-channel-token", "FP8_PER_CHANNEL_PER_TOKEN computes on fp8 dynamic per token activations"),
            ("int4-g32", "the module is delivered plain; its activations are not quantized"),
        ],
    )
    def test_an_activation_scale_that_the_mode_does_not_read(self, tmp_path: Path, scheme: str, reason: str):
        write_checkpoint(
            tmp_path, scheme=scheme, edit=lambda stored: stored.update({f"{DOWN}.input_scale": torch.ones(1)})
        )

        assert self.fate(plan_checkpoint(tmp_path), f"{DOWN}.input_scale") == (Fate.IGNORED, reason)


class TestFaults:
    @pytest.mark.parametrize(
        "name",
        ["model.embed_tokens.weight", "model.norm.weight", f"{LAYER}.input_layernorm.weight", "lm_head.weight"],
    )
    def test_a_module_of_the_architecture_that_is_missing_is_named(self, tmp_path: Path, name: str):
        write_checkpoint(tmp_path, edit=lambda stored: stored.pop(name))

        fault = faults(tmp_path)[name]

        assert fault.expected == "a tensor that LlamaForCausalLM needs"
        assert fault.found == "no such tensor in any shard"
        assert fault.remedy.startswith("No file is missing, so the checkpoint was saved without it")

    def test_a_bias_that_the_architecture_needs_is_named(self, tmp_path: Path):
        write_checkpoint(tmp_path, config=tiny_config("Qwen2ForCausalLM"), edit=lambda stored: stored.pop(f"{Q}.bias"))

        assert list(faults(tmp_path)) == [f"{Q}.bias"]

    def test_a_bias_that_the_architecture_does_not_have_is_named(self, tmp_path: Path):
        write_checkpoint(tmp_path, edit=lambda stored: stored.update({f"{Q}.bias": torch.ones(64)}))

        fault = faults(tmp_path)[f"{Q}.bias"]

        assert fault.expected == "only tensors of LlamaForCausalLM"
        assert fault.found == "float32 [64] without an owner"

    @pytest.mark.parametrize(
        ("scheme", "companion"),
        [
            ("int4-g32", "weight_scale"),
            ("int4-g32-asym", "weight_zero_point"),
            ("int8-plain-channel", "weight_scale"),
            ("fp8-tensor-static", "weight_scale"),
            ("fp8-tensor-static", "input_scale"),
            ("fp8-channel-token", "weight_scale"),
        ],
    )
    def test_a_companion_that_is_missing_is_named(self, tmp_path: Path, scheme: str, companion: str):
        write_checkpoint(tmp_path, scheme=scheme, edit=lambda stored: stored.pop(f"{Q}.{companion}"))

        fault = faults(tmp_path)[f"{Q}.{companion}"]

        assert fault.found == "no such tensor"
        assert fault.remedy

    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.7.self_attn.q_proj.weight_scale",
            f"{LAYER}.mlp.experts.0.weight_packed",
            "model.layers.2.self_attn.q_proj.weight_scale",
            "weight_scale",
            f"{Q}.weight_global_scale",
        ],
    )
    def test_a_quantization_tensor_without_a_module_is_named(self, tmp_path: Path, name: str):
        write_checkpoint(tmp_path, edit=lambda stored: stored.update({name: torch.ones(1)}))

        fault = faults(tmp_path)[name]

        assert fault.expected == "a module that this tensor belongs to"
        assert fault.found == "float32 [1] without an owner"
        assert "lost or renamed. No file is missing" in fault.remedy

    def test_a_scale_whose_weight_is_lost_is_named_beside_the_weight(self, tmp_path: Path):
        write_checkpoint(tmp_path, scheme="fp8-channel-token", edit=lambda stored: stored.pop(f"{Q}.weight"))

        assert faults(tmp_path).keys() == {f"{Q}.weight", f"{Q}.weight_scale"}

    @pytest.mark.parametrize(
        ("size", "module"),
        [("hidden_size", "model.norm"), ("vocab_size", "model.embed_tokens"), ("intermediate_size", DOWN)],
    )
    def test_a_model_of_other_sizes_is_refused(self, tmp_path: Path, size: str, module: str):
        write_checkpoint(tmp_path)
        rewrite_config(tmp_path, lambda config: config.update({size: config[size] * 2}))

        found = faults(tmp_path)

        assert any(where.startswith(module) for where in found)
        assert all("Take config.json from where the weights were published" in fault.remedy for fault in found.values())

    def test_faults_of_all_kinds_and_places_are_raised_together(self, tmp_path: Path):
        """If faults were reported one by one, each repair might cost another download."""

        def break_everything(stored: dict[str, Tensor]) -> None:
            del stored["model.norm.weight"]
            del stored[f"{Q}.weight_scale"]
            del stored[f"{DOWN}.input_scale"]
            del stored[f"{LAYER}.self_attn.k_scale"]
            stored["lm_head.weight"] = torch.ones(3, 3)
            stored[f"{LAYER}.mlp.extra.weight"] = torch.ones(3)
            stored[f"{O}.weight_g_idx"] = torch.ones(3)

        write_checkpoint(tmp_path, scheme="fp8-tensor-static", kv=True, edit=break_everything)

        assert faults(tmp_path).keys() == {
            "model.norm.weight",
            f"{Q}.weight_scale",
            f"{DOWN}.input_scale",
            f"{LAYER}.self_attn.k_scale",
            "lm_head.weight",
            f"{LAYER}.mlp.extra.weight",
            f"{O}.weight_g_idx",
        }

    @pytest.mark.parametrize(
        ("block", "where"),
        [
            ({"moe_sparsity_config": {"method": "novice", "num_experts": [4]}}, "moe_sparsity_config"),
            ({"moe_sparsity_config": {"method": "prune", "num_experts": [4, 3]}}, "moe_sparsity_config.num_experts"),
        ],
    )
    def test_a_configuration_that_changes_the_meaning_of_weights_is_refused(
        self, tmp_path: Path, block: dict[str, Any], where: str
    ):
        write_checkpoint(tmp_path)
        rewrite_config(tmp_path, lambda config: config["quantization_config"].update(block))

        assert list(faults(tmp_path)) == [f"config.json: quantization_config.{where}"]

    @pytest.mark.parametrize(
        ("location", "online"),
        [("weight_input", False), ("weight_output", False), ("k_cache", True), ("q_attn", True)],
    )
    def test_only_transforms_that_fold_into_weights_are_accepted(self, tmp_path: Path, location: str, online: bool):
        apply = [{"targets": ["Linear"], "location": location}]
        transforms = {"config_groups": {"R1": {"type": "hadamard", "apply": apply}}}
        write_checkpoint(tmp_path)
        rewrite_config(tmp_path, lambda config: config["quantization_config"].update(transform_config=transforms))

        if not online:
            assert plan_checkpoint(tmp_path).warnings == ()
            return
        ((where, fault),) = faults(tmp_path).items()
        assert where == "config.json: quantization_config.transform_config.R1"
        assert fault.found == f"a hadamard transform applied at run time ({location})"


class TestStrict:
    def test_a_module_that_would_be_dequantized_is_a_fault(self, tmp_path: Path):
        write_checkpoint(tmp_path, config=tiny_config(layers=1), scheme="int4-g32")

        found = faults(tmp_path, strict=True)

        assert len(found) == 7
        assert found[DOWN].expected == "a native mode at target modelopt (--strict)"
        assert "pack-quantized: int4 group 32: W4A16_AWQ holds groups of 64 or 128" in found[DOWN].found
        assert "without --strict" in found[DOWN].remedy

    @pytest.mark.parametrize("to", ["modelopt", "reference"])
    def test_native_modules_pass(self, tmp_path: Path, to: str):
        write_checkpoint(tmp_path, scheme="int4-g64")

        assert plan_checkpoint(tmp_path, to, strict=True) == plan_checkpoint(tmp_path, to)

    def test_dense_dequantizes_on_purpose(self, tmp_path: Path):
        write_checkpoint(tmp_path, scheme="int4-g32")

        assert plan_checkpoint(tmp_path, "dense", strict=True).dtype is DType.BF16


class TestWarnings:
    @pytest.mark.parametrize(
        ("damage", "warning"),
        [
            (lambda directory: (directory / "model.bin").touch(), "pickle files beside safetensors"),
            (
                lambda directory: rewrite_config(
                    directory, lambda config: config["quantization_config"].update(unheard_of=1)
                ),
                "unheard_of",
            ),
            (
                lambda directory: rewrite_config(
                    directory,
                    lambda config: config["quantization_config"]["config_groups"]["group_0"].update(
                        format="int-quantized"
                    ),
                ),
                "declared as int-quantized, stored as pack-quantized: the tensors decide (14 modules)",
            ),
        ],
    )
    def test_oddities_of_files_configuration_and_weights_give_warnings(
        self, tmp_path: Path, damage: Callable[[Path], object], warning: str
    ):
        write_checkpoint(tmp_path)
        damage(tmp_path)

        (told,) = plan_checkpoint(tmp_path).warnings

        assert warning in told


@pytest.mark.parametrize(
    ("recipe", "native"), [("AWQModifier:\n  n: 1", "W4A16_AWQ"), ("GPTQModifier:\n  n: 1", "W4A16_GPTQ")]
)
def test_the_recipe_decides_the_family_but_not_the_mode(tmp_path: Path, recipe: str, native: str) -> None:
    write_checkpoint(tmp_path, scheme="int4-g64")
    (tmp_path / "recipe.yaml").write_text(recipe)

    module = plan_checkpoint(tmp_path).module(O)

    assert (module.native_mode, module.delivered_mode) == (native, "W4A16_AWQ g64")


def test_the_quantized_embedding_and_lm_head_are_dequantized(tmp_path: Path) -> None:
    """Releases keep both plain."""
    write_checkpoint(tmp_path, scheme={"lm_head": "int8-channel", "o_proj": "int8-channel"})

    def quantize_embedding(stored: dict[str, Tensor]) -> None:
        stored.pop("model.embed_tokens.weight")
        stored["model.embed_tokens.weight"] = torch.ones(96, 64, dtype=torch.int8)
        stored["model.embed_tokens.weight_scale"] = torch.ones(96, 1)

    rewrite(tmp_path, quantize_embedding)

    plan = plan_checkpoint(tmp_path)

    for name in ("lm_head", "model.embed_tokens"):
        assert plan.module(name).delivered_mode == "dequantized"
        assert plan.module(name).reason == "engines read this module plain"
        assert str(plan.delivered_specs[f"{name}.weight"]) == "bfloat16 [96, 64]"
        assert name in plan.quant_config.exclude_modules


@pytest.mark.parametrize("both", [False, True])
def test_a_quantized_embedding_that_is_also_the_head(tmp_path: Path, both: bool) -> None:
    """For tied embeddings some writers store one table and others two; the embedding is used."""
    tensors, exact = Writer(torch.bfloat16, torch.Generator().manual_seed(1)).store(SCHEMES["int8-channel"], (96, 64))

    def quantize(stored: dict[str, Tensor]) -> None:
        del stored["model.embed_tokens.weight"]
        for module in ("model.embed_tokens", "lm_head")[: 1 + both]:
            stored |= {f"{module}.{local}": tensor.clone() for local, tensor in tensors.items()}

    write_checkpoint(tmp_path, config=tiny_config(tied=True), scheme="int8-channel", edit=quantize)
    checkpoint = open_checkpoint(tmp_path)
    plan = checkpoint.plan()

    delivered = dict(item for _, found in stream_delivered(plan, checkpoint.catalog) for item in found.items())
    assert torch.equal(delivered["model.embed_tokens.weight"], round_once(exact, torch.bfloat16))
    assert "lm_head.weight" not in delivered
    assert {fate.reason for fate in plan.fates() if fate.name.startswith("lm_head.")} == (
        {"it equals the embeddings, to which config.json ties it"} if both else set()
    )


def test_a_model_whose_prefix_is_unknown_is_one_fault_that_names_the_known_ones(tmp_path: Path):
    def rename(stored: dict[str, torch.Tensor]) -> None:
        for name in list(stored):
            stored[f"thinker.{name}"] = stored.pop(name)

    write_checkpoint(tmp_path, edit=rename)

    (fault,) = faults(tmp_path).values()

    assert fault.where == "names of the tensors"
    assert "model., language_model.model., model.language_model." in fault.expected
    assert "thinker.model.layers." in fault.found
    assert "Give the tensors one of these prefixes" in fault.remedy
