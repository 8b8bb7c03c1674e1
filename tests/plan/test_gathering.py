"""The modules of a checkpoint are those of the model, whatever form its tensors have in the files.

Catalogs are made from names and shapes alone; no file is there that could be read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mistral_form import native_name
from tiny_models import FAMILIES, linears, norms, tiny_config

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PlanError
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.checkpoint.catalog import Catalog, StoredTensor
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.plan.gathering import gather_modules
from trtllm_ct.plan.models.sites import Model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import Fault
    from trtllm_ct.plan.stored import StoredModule

    Specs = Mapping[str, TensorSpec]

LLAMA, MISTRAL, MIXTRAL, QWEN = (f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Mixtral", "Qwen3Moe"))
EXPERTS = "model.layers.0.mlp.experts"
Q = "model.layers.0.self_attn.q_proj"
SCALE = TensorSpec(DType.F32, (1,))


def spec(*shape: int, dtype: DType = DType.BF16) -> TensorSpec:
    return TensorSpec(dtype, shape)


def specs_of(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Every tensor of a plain model, experts one by one."""
    specs = {"model.embed_tokens.weight": spec(config["vocab_size"], config["hidden_size"])}
    specs |= {f"{module}.weight": spec(size) for module, size in norms(config)}
    for module, shape, bias in linears(config):
        specs[f"{module}.weight"] = spec(*shape)
        if bias:
            specs[f"{module}.bias"] = spec(shape[0])
    return specs


def gathered(
    config: Mapping[str, Any], specs: Specs, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, StoredModule], list[Fault]]:
    tensors = {name: StoredTensor(name=name, spec=each, file="x", offset=0) for name, each in specs.items()}
    catalog = Catalog(source=Folder(Path()), tensors=tensors, files=("x",))
    faults = FaultCollector()
    return gather_modules(catalog, Model.from_config(config), faults, shapes), faults.faults


def modules(config: Mapping[str, Any], specs: Specs) -> dict[str, StoredModule]:
    """The modules; fails on any fault."""
    found, faults = gathered(config, specs)
    assert faults == []
    return found


def sparse(name: str, rows: int, columns: int, values: int) -> dict[str, TensorSpec]:
    """The pieces of a tensor as releases 0.9 to 0.14 write them."""
    return {
        f"{name}.shape": spec(2, dtype=DType.I64),
        f"{name}.compressed": spec(values),
        f"{name}.bitmask": spec(rows, -(-columns // 8), dtype=DType.U8),
        f"{name}.row_offsets": spec(rows, dtype=DType.I64),
    }


class TestHuggingFaceNames:
    @pytest.mark.parametrize("architecture", FAMILIES)
    def test_every_module_has_its_stored_name_in_the_order_of_the_files(self, architecture: str) -> None:
        config = tiny_config(architecture)
        specs = specs_of(config)

        found = modules(config, specs)

        assert list(found) == list(dict.fromkeys(name.rpartition(".")[0] for name in specs))
        assert {
            f"{name}.{local}": view.spec for name, module in found.items() for local, view in module.views.items()
        } == specs
        assert all(module.name == module.stored_name == name for name, module in found.items())

    def test_a_checkpoint_without_tensors_has_no_modules(self) -> None:
        assert modules(tiny_config(), {}) == {}

    def test_a_tensor_without_a_module_belongs_to_the_module_with_an_empty_name(self) -> None:
        assert list(modules(tiny_config(), {"scale": SCALE})) == [""]


class TestMistralNames:
    @pytest.mark.parametrize("architecture", [MISTRAL, MIXTRAL])
    def test_become_those_of_hugging_face_and_messages_keep_them(self, architecture: str) -> None:
        config = tiny_config(architecture)
        specs = specs_of(config)
        native = {native_name(name): spec_ for name, spec_ in specs.items() if ".experts." not in name}

        found = modules(config, native)

        want = [name for name in modules(config, specs) if ".experts." not in name]
        assert list(found) == want
        assert [module.stored_name for module in found.values()] == [native_name(f"{name}.")[:-1] for name in want]

    def test_experts_get_the_names_of_the_architecture(self) -> None:
        native = {f"layers.0.feed_forward.experts.1.w{i}.weight": spec(4, 4) for i in (1, 2, 3)}
        native["layers.0.attention.wq.weight"] = spec(4, 4)

        found = modules(tiny_config(QWEN), native)

        assert set(found) == {Q, *(f"{EXPERTS}.1.{leaf}_proj" for leaf in ("gate", "up", "down"))}
        assert found[f"{EXPERTS}.1.up_proj"].stored_name == "layers.0.feed_forward.experts.1.w3"

    def test_modules_that_the_model_has_no_name_for_are_listed_and_raised(self) -> None:
        native = {"layers.0.attention.wq.weight": spec(4, 4), "layers.0.mamba.in_proj.weight": spec(4, 4)}

        with pytest.raises(PlanError) as caught:
            gathered(tiny_config(MISTRAL), native)

        assert [fault.where for fault in caught.value.faults] == ["layers.0.mamba.in_proj"]

    def test_a_tensor_under_both_names_is_a_fault(self) -> None:
        names = ("layers.0.attention.k_fake_quantizer.qscale_act", "layers.0.attention.k_scale")

        _, faults = gathered(tiny_config(MISTRAL), dict.fromkeys(names, SCALE))

        assert [fault.where for fault in faults] == [names[1]]


class TestFusedExperts:
    FUSED: Specs = {  # noqa: RUF012 (a constant)
        f"{EXPERTS}.gate_up_proj.weight": spec(3, 8, 4, dtype=DType.F8_E4M3),
        f"{EXPERTS}.gate_up_proj.weight_scale": spec(3, 8, 1),
        f"{EXPERTS}.down_proj": spec(3, 4, 4),
    }

    def test_each_expert_has_its_part(self) -> None:
        found = modules(tiny_config(QWEN), self.FUSED)

        assert set(found) == {f"{EXPERTS}.{i}.{leaf}_proj" for i in range(3) for leaf in ("gate", "up", "down")}
        assert found[f"{EXPERTS}.2.up_proj"].specs == {
            "weight": spec(4, 4, dtype=DType.F8_E4M3),
            "weight_scale": spec(4, 1),
        }
        assert found[f"{EXPERTS}.2.down_proj"].specs == {"weight": spec(4, 4)}

    def test_the_parts_contain_every_element_once(self) -> None:
        elements: dict[str, Counter[int]] = {name: Counter() for name in self.FUSED}
        for module in modules(tiny_config(QWEN), self.FUSED).values():
            for view in module.views.values():
                (run,) = view.runs
                elements[run.name].update(range(run.begin, run.end or 0))

        assert elements == {name: Counter(range(each.numel)) for name, each in self.FUSED.items()}

    def test_a_model_without_experts_keeps_them_as_stored(self) -> None:
        assert list(modules(tiny_config(LLAMA), self.FUSED)) == [f"{EXPERTS}.gate_up_proj", EXPERTS]

    def test_other_modules_are_unchanged(self) -> None:
        beside = {f"{Q}.weight": spec(4, 4), f"{EXPERTS}.0.gate_proj.bias": spec(4)}

        found = modules(tiny_config(QWEN), {**beside, **self.FUSED})

        assert next(iter(found)) == Q
        assert found[f"{EXPERTS}.0.gate_proj"].specs.keys() == {"bias", "weight", "weight_scale"}


class TestSparse:
    CONFIG = tiny_config(LLAMA, hidden=36, heads=3, kv_heads=3)

    def test_pieces_become_one_tensor_with_the_shape_from_the_model(self) -> None:
        """A bitmask of five bytes a row holds 33 to 40 columns."""
        found = modules(self.CONFIG, sparse(Q, 36, 36, values=50))

        assert found[Q].specs == {"weight": spec(36, 36)}
        assert set(found[Q].views["weight"].sources) == sparse(Q, 36, 36, values=50).keys()

    def test_shapes_that_were_read_take_precedence_over_the_model(self) -> None:
        found, faults = gathered(self.CONFIG, sparse(Q, 36, 36, values=50), {f"{Q}.shape": (36, 39)})

        assert found[Q].specs == {"weight": spec(36, 39)}
        assert faults == []

    def test_pieces_that_contradict_the_shape_are_a_fault_and_make_no_weight(self) -> None:
        found, faults = gathered(self.CONFIG, sparse(Q, 36, 36, values=50), {f"{Q}.shape": (36, 50)})

        assert "weight" not in found[Q].views
        assert [fault.where.rpartition(".")[0] for fault in faults] == [Q]

    def test_a_tensor_that_is_stored_plain_as_well_is_a_fault(self) -> None:
        _, faults = gathered(self.CONFIG, {f"{Q}.weight": spec(36, 36), **sparse(Q, 36, 36, values=50)})

        assert [(fault.where, fault.found) for fault in faults] == [
            (f"{Q}.weight", f"it plain and in pieces, as {Q}.compressed")
        ]

    @pytest.mark.parametrize("body", ["model.", "language_model.model.", "model.language_model."])
    def test_the_text_model_is_found_under_every_prefix(self, body: str) -> None:
        config = {"architectures": ["Wrapper"], "text_config": self.CONFIG, "dtype": "bfloat16"}
        name = Q.replace("model.", body)

        assert modules(config, sparse(name, 36, 36, values=50))[name].specs == {"weight": spec(36, 36)}
