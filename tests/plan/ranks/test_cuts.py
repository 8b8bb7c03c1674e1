"""Parallel sizes for a model: which of them work, and which slices each kind of module gets."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings
from quantized_weights import ints, weight
from stated_model import stated_model
from tiny_models import FAMILIES, tiny_config

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.engine.parallel import ONE_RANK, Cut, Parallel
from trtllm_ct.engine.slices import Slices
from trtllm_ct.engine.target import MODELOPT, TENSORRT_LLM
from trtllm_ct.plan.assign import Candidate
from trtllm_ct.plan.models.sites import Model
from trtllm_ct.plan.ranks.cuts import cut_of, refuse_uneven, with_slices
from trtllm_ct.plan.stored import StoredModule, Whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import Fault
    from trtllm_ct.plan.models.sites import Site

QWEN2, SHARED = "Qwen2MoeForCausalLM", "shared_expert_intermediate_size"
QWEN, MIXTRAL, DEEPSEEK = "Qwen3MoeForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def model(architecture: str = "LlamaForCausalLM", **sizes: Any) -> Model:
    return stated_model(tiny_config(architecture, **{"layers": 1, **sizes}))


def sites(of: Model) -> dict[str, Site]:
    return {site.module: site for site in of.sites()}


def faults(of: Model, **sizes: Any) -> dict[str, Fault]:
    """Return the faults for these sizes, by their `where`."""
    collector = FaultCollector()
    refuse_uneven(of, Parallel(**sizes), collector)
    return {fault.where.removeprefix("config.json: "): fault for fault in collector.faults}


def candidates(of: Model) -> dict[str, Candidate]:
    """Return every Linear with int8 codes; Linears of one shape share their `Weight`, as in the planner."""
    known = {shape: weight(ints(8), shape=shape) for shape in dict.fromkeys(site.shape for site in of.sites())}
    return {
        name: Candidate(site=site, weight=known[site.shape])
        for name, site in sites(of).items()
        if site.class_name == "Linear"
    }


def slices(of: Model, target: Any = MODELOPT, **sizes: Any) -> dict[str, Slices | None]:
    cut = with_slices(candidates(of), of, Parallel(**sizes), target)
    return {name: candidate.weight.slices for name, candidate in cut.items()}


class TestWhichCut:
    @pytest.mark.parametrize("architecture", FAMILIES)
    def test_under_attention_data_parallelism_a_rank_has_all_of_attention_and_of_the_vocabulary(
        self, architecture: str
    ) -> None:
        spread = Parallel(tensor=2, attention_dp=True)
        for name, site in sites(model(architecture, layers=2)).items():
            whole = ".self_attn." in name or name in {"model.embed_tokens", "lm_head"}
            assert cut_of(site, spread) is (Cut.NONE if whole else site.cut), name
            assert cut_of(site, replace(spread, attention_dp=False)) is site.cut, name

    def test_kv_heads_are_sliced_by_heads(self) -> None:
        cuts = {name: cut_of(site, Parallel(tensor=2)) for name, site in sites(model()).items()}

        assert [cuts[f"{ATTENTION}.{leaf}_proj"] for leaf in "qkvo"] == [
            Cut.COLUMN,
            Cut.KV_HEADS,
            Cut.KV_HEADS,
            Cut.ROW,
        ]
        assert cuts["model.norm"] is Cut.NONE


class TestSlices:
    def test_one_rank_gets_the_candidates_themselves(self) -> None:
        given_ones = candidates(model())

        assert with_slices(given_ones, model(), ONE_RANK, MODELOPT) is given_ones

    def test_slices_of_a_dense_model(self) -> None:
        found = slices(model(heads=8, kv_heads=4), tensor=2)

        common = {"tensor": 2, "repeats_scales": False, "sizes": (1, 2, 4, 8)}
        joined, heads = Slices(**common), Slices(**common, heads=4)
        output = Slices(**common, columns=True, alone=True)
        assert found == {
            f"{ATTENTION}.q_proj": joined,
            f"{ATTENTION}.k_proj": heads,
            f"{ATTENTION}.v_proj": heads,
            f"{ATTENTION}.o_proj": output,
            f"{MLP}.gate_proj": joined,
            f"{MLP}.up_proj": joined,
            f"{MLP}.down_proj": output,
            "lm_head": Slices(**common, alone=True),
        }

    def test_slices_of_linears_that_are_stored_as_one(self) -> None:
        """Each part is sliced for itself, and newer engines slice none of them at an alignment."""
        found = slices(model("Phi3ForCausalLM", hidden=64, heads=4, kv_heads=2), tensor=2)

        qkv, gate_up = found[f"{ATTENTION}.qkv_proj"], found[f"{MLP}.gate_up_proj"]
        assert qkv is not None
        assert gate_up is not None
        assert (qkv.parts, qkv.alone, qkv.heads) == ((64, 32, 32), False, None)
        assert (gate_up.parts, gate_up.alone) == ((128, 128), False)

    def test_experts_are_sliced_for_the_ranks_that_share_them(self) -> None:
        found = slices(model(MIXTRAL), tensor=4, expert=2)
        experts = {name: own for name, own in found.items() if ".experts." in name}

        assert len(experts) == 4 * 3
        assert {(own.tensor, own.expert, own.alone) for own in experts.values() if own} == {(4, 2, False)}
        assert {name.rpartition(".")[2] for name, own in experts.items() if own and own.columns} == {"w2"}
        attention = found[f"{ATTENTION}.o_proj"]
        assert attention is not None
        assert (attention.tensor, attention.expert) == (4, 1)

    def test_whole_experts_have_no_slices(self) -> None:
        found = slices(model(MIXTRAL), tensor=4, expert=4)

        assert {own for name, own in found.items() if ".experts." in name} == {None}
        assert found[f"{ATTENTION}.q_proj"] is not None

    def test_attention_data_parallelism_slices_the_other_modules(self) -> None:
        found = slices(model(), tensor=2, attention_dp=True)

        assert {name for name, own in found.items() if own} == {f"{MLP}.{leaf}_proj" for leaf in ("gate", "up", "down")}

    def test_pipeline_stages_alone_slice_nothing(self) -> None:
        assert set(slices(model(layers=2), pipeline=2).values()) == {None}

    @pytest.mark.parametrize("target", [MODELOPT, TENSORRT_LLM], ids=lambda target: target.name)
    def test_the_target_says_whether_scales_are_delivered_repeated(self, target: Any) -> None:
        keys = slices(model(), target, tensor=4)[f"{ATTENTION}.k_proj"]

        assert keys is not None
        assert keys.repeats_scales is target.repeats_kv_scales

    def test_weights_with_the_same_slices_are_still_one_object(self) -> None:
        """Modes are decided once for each object, and a model has a hundred thousand weights."""
        of = model(layers=2)
        cut: Mapping[str, Candidate] = with_slices(candidates(of), of, Parallel(tensor=2), MODELOPT)

        first, second = (cut[f"model.layers.{layer}.self_attn.k_proj"].weight for layer in (0, 1))
        assert first is second
        # Of one shape, but not cut alike.
        assert cut[f"{ATTENTION}.q_proj"].weight.shape == cut[f"{ATTENTION}.o_proj"].weight.shape
        assert cut[f"{ATTENTION}.q_proj"].weight is not cut[f"{ATTENTION}.o_proj"].weight

    def test_nothing_else_of_a_candidate_changes(self) -> None:
        of = model()
        before = {name: own._replace(folded="why") for name, own in candidates(of).items()}

        after = with_slices(before, of, Parallel(tensor=2), MODELOPT)

        assert {name: own._replace(weight=replace(own.weight, slices=None)) for name, own in after.items()} == before


COUNTS = st.sampled_from([1, 2, 3, 4, 6, 8, 24])


def can_share(heads: int, kv_heads: int, intermediate: int, ranks: int) -> bool:
    """Whether each rank has whole heads and rows, and K/V heads are divided or repeated evenly."""
    begin_of_ranks, begin_of_heads = ({Fraction(i, count) for i in range(count)} for count in (ranks, kv_heads))
    whole_kv = begin_of_ranks <= begin_of_heads or begin_of_heads <= begin_of_ranks
    return heads % ranks == 0 and intermediate % ranks == 0 and whole_kv


class TestUneven:
    def test_one_rank_can_have_any_model(self) -> None:
        assert faults(model(heads=4, kv_heads=3, intermediate=127)) == {}

    @settings(max_examples=150, deadline=None)
    @given(heads=COUNTS, kv_heads=COUNTS, intermediate=COUNTS, tensor=st.sampled_from([2, 3, 4, 6, 8, 32]))
    @example(heads=24, kv_heads=24, intermediate=24, tensor=32)
    def test_sizes_that_work_are_exactly_those_that_are_not_refused(
        self, heads: int, kv_heads: int, intermediate: int, tensor: int
    ) -> None:
        of = model(hidden=8 * heads, heads=heads, kv_heads=kv_heads, intermediate=intermediate)

        found = faults(of, tensor=tensor)

        assert bool(found) is not can_share(heads, kv_heads, intermediate, tensor)
        tried = range(1, max(16, tensor) + 1)
        work = ", ".join(str(size) for size in tried if can_share(heads, kv_heads, intermediate, size))
        assert {fault.remedy for fault in found.values()} <= {f"Tensor-parallel sizes that work: {work}."}

    @pytest.mark.parametrize(
        ("of", "sizes", "where", "found"),
        [
            (model(heads=4, kv_heads=4), {"tensor": 8}, "num_attention_heads", "4"),
            (model(heads=12, hidden=96, kv_heads=6), {"tensor": 4}, "num_key_value_heads", "6"),
            (model(intermediate=130), {"tensor": 4}, "intermediate_size", "130"),
            (model(QWEN2, kv_heads=4, shared_expert_intermediate_size=66), {"tensor": 4}, SHARED, "66"),
            (model(QWEN, num_experts=3), {"tensor": 2, "expert": 2}, "number of experts", "3"),
            (model(QWEN, moe_intermediate_size=65), {"tensor": 2}, "intermediate size of experts", "65"),
            (model(layers=2), {"pipeline": 3}, "num_hidden_layers", "2"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_sizes_that_can_not_be_divided_are_named(
        self, of: Model, sizes: dict[str, int], where: str, found: str
    ) -> None:
        assert {key: fault.found for key, fault in faults(of, **sizes).items()} == {where: found}

    @pytest.mark.parametrize(("kv_heads", "tensor", "even"), [(2, 8, True), (1, 8, True), (3, 8, False), (8, 8, True)])
    def test_more_ranks_than_heads_must_be_a_multiple(self, kv_heads: int, tensor: int, even: bool) -> None:
        of = model(heads=24, hidden=192, kv_heads=kv_heads)

        assert ("num_key_value_heads" not in faults(of, tensor=tensor)) is even

    def test_kv_heads_that_are_stored_with_queries_are_not_repeated(self) -> None:
        of = model("Phi3ForCausalLM", heads=4, kv_heads=2)

        assert faults(of, tensor=2) == {}
        assert faults(of, tensor=4).keys() == {"num_key_value_heads"}

    def test_latent_attention_has_no_kv_heads(self) -> None:
        of = model(DEEPSEEK, kv_lora_rank=33, num_key_value_heads=3)

        assert faults(of, tensor=4) == {}

    def test_dense_parts_may_be_uneven_if_ranks_vary(self) -> None:
        of = model(DEEPSEEK, layers=2, intermediate=130, n_shared_experts=1)

        assert faults(of, tensor=4) == {}

    def test_a_model_with_experts_only_has_no_dense_part(self) -> None:
        assert faults(model(QWEN, intermediate=130), tensor=4) == {}
        with_dense_layer = model(QWEN, layers=2, intermediate=130, mlp_only_layers=[0])
        assert faults(with_dense_layer, tensor=4).keys() == {"intermediate_size"}

    def test_experts_are_divided_by_the_ranks_of_one_expert_group(self) -> None:
        of = model(QWEN, moe_intermediate_size=66, num_experts=6)

        assert faults(of, tensor=4, expert=2) == {}
        fault = faults(of, tensor=4)["intermediate size of experts"]
        assert fault.expected == "a number that 4 ranks can share evenly"

    def test_if_no_tensor_parallel_size_works_the_remedy_is_another_expert_parallel_size(self) -> None:
        fault = faults(model(QWEN, num_experts=3), tensor=2, expert=2)["number of experts"]

        assert fault.remedy == "Use another expert-parallel size."

    def test_attention_data_parallelism_still_divides_experts(self) -> None:
        of = model(QWEN, heads=3, hidden=48, kv_heads=3, moe_intermediate_size=65)

        assert faults(of, tensor=2, attention_dp=True).keys() == {"intermediate size of experts"}
        assert faults(model(intermediate=130), tensor=4, attention_dp=True) == {}

    @pytest.mark.parametrize("stages", [1, 2, 3])
    def test_a_stage_may_have_a_single_layer(self, stages: int) -> None:
        assert faults(model(layers=3), pipeline=stages) == {}

    @pytest.mark.parametrize(
        "architecture", ["Gemma4ForCausalLM", "Gemma4UnifiedForConditionalGeneration", "GptOssForCausalLM"]
    )
    def test_some_classes_refuse_several_pipeline_stages(self, architecture: str) -> None:
        """TensorRT-LLM `modeling_gemma4.py` (00e7d103) and `modeling_gpt_oss.py` (050b6cb9) assert a size of 1."""
        of = found_in_files(architecture, {"self_attn.q_proj": (64, 64)}, num_hidden_layers=2)

        assert faults(of, pipeline=2)["architectures"].remedy == "Use a pipeline-parallel size of 1."
        assert faults(of, pipeline=1) == {}


UNEVEN_MLP = {"mlp.gate_proj": (130, 384), "mlp.up_proj": (130, 384), "mlp.down_proj": (384, 130)}


def found_in_files(architecture: str, linears: dict[str, tuple[int, int]], **config: Any) -> Model:
    """A model whose row lists no modules, with these Linears in each of two layers; those of attention have a bias."""
    names = {f"model.layers.{layer}.{path}": shape for layer in range(2) for path, shape in linears.items()}
    stored = {
        name: StoredModule(
            name,
            {"weight": Whole(name=f"{name}.weight", spec=TensorSpec(DType.BF16, shape))}
            | ({"bias": Whole(name=f"{name}.bias", spec=TensorSpec(DType.BF16, shape[:1]))} if "attn" in name else {}),
        )
        for name, shape in names.items()
    }
    return Model.from_config({"architectures": [architecture], **config}).in_checkpoint(stored)


class TestModelsOfFiles:
    """Models whose row lists no modules are divided by the shapes of their weights and the numbers in config.json."""

    SEED, GLM = "SeedOssForCausalLM", "Glm4MoeForCausalLM"

    def test_heads_are_divided_and_not_rows(self) -> None:
        """Four ranks can share 384 rows, and not the six heads that these are."""
        of = found_in_files(self.SEED, {"self_attn.q_proj": (384, 384)}, num_attention_heads=6, head_dim=64)

        assert {where: fault.found for where, fault in faults(of, tensor=4).items()} == {"num_attention_heads": "6"}
        assert faults(of, tensor=3) == {}

    def test_what_follows_from_an_uneven_number_of_heads_is_not_said_again(self) -> None:
        of = found_in_files(self.SEED, {"self_attn.q_proj": (330, 384)}, num_attention_heads=6, head_dim=55)

        assert faults(of, tensor=4).keys() == {"num_attention_heads"}

    def test_uneven_weights_are_named(self) -> None:
        of = found_in_files(self.SEED, UNEVEN_MLP, num_attention_heads=4, hidden_size=384)

        assert faults(of, tensor=4).keys() == {"size of gate_proj", "size of up_proj", "size of down_proj"}
        assert faults(of, tensor=4, attention_dp=True) == {}

    def test_an_mlp_may_be_uneven_if_ranks_vary(self) -> None:
        of = found_in_files(self.GLM, UNEVEN_MLP, num_attention_heads=4, num_key_value_heads=4, hidden_size=384)

        assert faults(of, tensor=4) == {}

    def test_a_bias_that_would_be_repeated_is_named_once_for_all_layers(self) -> None:
        linears = {f"self_attn.{leaf}_proj": (128, 384) for leaf in "kv"}
        of = found_in_files(self.SEED, linears, num_attention_heads=4, num_key_value_heads=2, head_dim=64)

        assert list(faults(of, tensor=4)) == ["self_attn.k_proj.bias", "self_attn.v_proj.bias"]
        assert faults(of, tensor=2) == {}

    def test_layers_may_have_different_numbers_of_heads(self) -> None:
        """The layer with the fewest decides, whatever layer comes last."""
        stored = {
            f"model.layers.{layer}.self_attn.k_proj": StoredModule(
                f"model.layers.{layer}.self_attn.k_proj",
                {
                    local: Whole(name=f"{layer}.{local}", spec=TensorSpec(DType.BF16, shape))
                    for local, shape in (("weight", (rows, 384)), ("bias", (rows,)))
                },
            )
            for layer, rows in enumerate((128, 256))
        }
        config = {"architectures": [self.SEED], "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
        of = Model.from_config(config).in_checkpoint(stored)

        assert list(faults(of, tensor=4)) == ["self_attn.k_proj.bias"]


class TestRepeatedBiases:
    """Engines repeat the bias of repeated K/V heads element by element."""

    BIASED = model("Qwen2ForCausalLM", heads=4, kv_heads=2)

    def test_biases_are_refused_for_more_ranks_than_heads(self) -> None:
        found = faults(self.BIASED, tensor=4)

        assert list(found) == ["self_attn.k_proj.bias", "self_attn.v_proj.bias"]
        assert {(fault.found, fault.remedy) for fault in found.values()} == {
            ("2 heads", "Use a tensor-parallel size of at most 2, or attention data parallelism.")
        }

    @pytest.mark.parametrize(
        ("of", "sizes"),
        [
            (BIASED, {"tensor": 2}),
            (BIASED, {"tensor": 4, "attention_dp": True}),
            (model(heads=4, kv_heads=2), {"tensor": 4}),
            (model("Qwen2ForCausalLM", heads=4, kv_heads=4), {"tensor": 4}),
        ],
        ids=["as many ranks as heads", "attention data parallelism", "no bias", "as many heads as ranks"],
    )
    def test_nothing_is_refused_if_no_bias_is_repeated(self, of: Model, sizes: dict[str, Any]) -> None:
        assert faults(of, **sizes) == {}

    def test_a_size_that_would_repeat_biases_is_not_listed_as_working(self) -> None:
        fault = faults(self.BIASED, tensor=3)["num_attention_heads"]

        assert fault.remedy == "Tensor-parallel sizes that work: 1, 2."
