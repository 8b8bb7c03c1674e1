"""The few values that are read before planning: of which tensors, and what the probe contains.

Files are written by safetensors; the probe is compared with the saved tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import oracles
import pytest
import torch
from builders import SCHEMES, quantization_block, tiny_config, write_checkpoint
from mistral_form import write_native

from trtllm_ct.base.errors import CatalogError
from trtllm_ct.layouts.packing import packed_words
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.pipeline.probing import probe_checkpoint
from trtllm_ct.plan.probe import NO_PROBE, Probe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.plan.models.sites import Model

    Edit = Callable[[dict[str, Tensor]], object]

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
Q, K, V, O = (f"{ATTENTION}.{letter}_proj" for letter in "qkvo")  # noqa: E741 (the name of the projection)
GATE, UP = (f"{MLP}.{leaf}_proj" for leaf in ("gate", "up"))
JOINED = (Q, K, V, GATE, UP)
LLAMA = tiny_config(layers=1, hidden=64, kv_heads=4, intermediate=64, vocabulary=4)
FILE = "model.safetensors"


def symmetric(scheme: str) -> dict[str, Any]:
    """A config.json that calls weights symmetric, whatever is stored with them."""
    group = SCHEMES[scheme].group
    return LLAMA | {
        "quantization_config": quantization_block(
            {"group_0": group | {"weights": group["weights"] | {"symmetric": True}}}
        )
    }


def probed(
    directory: Path,
    scheme: str | dict[str, str] = "nvfp4",
    edit: Edit | None = None,
    config: dict[str, Any] = LLAMA,
) -> Probe:
    write_checkpoint(directory, config=config, scheme=scheme, edit=edit)
    return open_checkpoint(directory).probe


def update(**tensors: Tensor) -> Edit:
    """Return an edit that stores these tensors for `q_proj`."""
    return lambda stored: stored.update({f"{Q}.{local}": tensor for local, tensor in tensors.items()})


def read_of(directory: Path) -> tuple[QuantizationConfig, Catalog, Model]:
    """Return the probe of an edited checkpoint."""
    checkpoint = open_checkpoint(directory)
    return checkpoint.config, checkpoint.catalog, checkpoint.model


class TestNothingToRead:
    @pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel", "fp8-tensor-static", "mxfp4a16", "dense"])
    def test_most_checkpoints_have_no_such_tensor(self, tmp_path: Path, scheme: str) -> None:
        assert probed(tmp_path, scheme) == NO_PROBE

    @pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-asym", "int8-channel-asym", "dense"])
    def test_no_file_is_opened_then(self, tmp_path: Path, scheme: str) -> None:
        """Zero points of asymmetric weights are used whatever their values."""
        headers = read_of(write_checkpoint(tmp_path, config=LLAMA, scheme=scheme).directory)
        (tmp_path / FILE).unlink()

        assert probe_checkpoint(*headers) == NO_PROBE


class TestScalars:
    def test_are_read_for_parts_that_must_share_them(self, tmp_path: Path) -> None:
        def number(stored: dict[str, Tensor]) -> None:
            for i, name in enumerate(name for name in stored if name.endswith("global_scale")):
                stored[name] = torch.tensor([1.5 + i])

        built = write_checkpoint(tmp_path, config=LLAMA, scheme="nvfp4", edit=number)

        found = open_checkpoint(tmp_path).probe

        shared = [f"{name}.{kind}_global_scale" for name in JOINED for kind in ("weight", "input")]
        assert found == Probe(scalars={name: float(built.stored[name]) for name in shared})
        assert f"{O}.weight_global_scale" in built.stored

    @pytest.mark.parametrize(
        ("dtype", "form"), [(torch.bfloat16, ()), (torch.float16, (1,)), (torch.float32, (1, 1))], ids=str
    )
    def test_may_be_of_any_wide_float_and_form(self, tmp_path: Path, dtype: torch.dtype, form: tuple[int, ...]) -> None:
        scalar = torch.full(form, 2003.0).to(dtype)

        found = probed(tmp_path, edit=update(weight_global_scale=scalar))

        assert found.scalars[f"{Q}.weight_global_scale"] == float(scalar)

    @pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "-1.0", "0.0"])
    def test_are_not_validated_here(self, tmp_path: Path, bad: str) -> None:
        found = probed(tmp_path, edit=update(input_global_scale=torch.tensor([float(bad)])))

        assert str(found.scalars[f"{Q}.input_global_scale"]) == bad

    @pytest.mark.parametrize(
        "other", [torch.ones(2), torch.ones(0), torch.ones(1, dtype=torch.int32), torch.ones(1).double()], ids=str
    )
    def test_tensors_that_are_no_scalar_are_left_to_the_planner(self, tmp_path: Path, other: Tensor) -> None:
        found = probed(tmp_path, edit=update(weight_global_scale=other))

        assert f"{Q}.weight_global_scale" not in found.scalars
        assert f"{Q}.input_global_scale" in found.scalars


class TestPowers:
    @staticmethod
    def exact(scale: Tensor) -> tuple[int, int]:
        """Return the least and the greatest power under which every scale is exact, by trying all."""
        powers = [
            power
            for power in range(-30, 30)
            if torch.equal((shifted := scale.double() * 2.0**power).to(torch.float8_e4m3fn).double(), shifted)
        ]
        return min(powers), max(powers)

    @pytest.mark.parametrize("stored_as", [torch.float8_e4m3fn, torch.uint8], ids=str)
    def test_are_read_if_scalars_are_powers_of_two_apart(self, tmp_path: Path, stored_as: torch.dtype) -> None:
        def apart(stored: dict[str, Tensor]) -> None:
            stored[f"{Q}.weight_global_scale"] *= 4
            stored[f"{GATE}.weight_global_scale"] *= 3
            scale = torch.tensor([1.5, 0.25, 96.0, 1.75]).to(torch.float8_e4m3fn)
            stored[f"{Q}.weight_scale"] = scale.repeat(64, 1).view(stored_as)

        built = write_checkpoint(tmp_path, config=LLAMA, scheme="nvfp4", edit=apart)

        found = open_checkpoint(tmp_path).probe.powers

        scales = {f"{name}.weight_scale": built.stored[f"{name}.weight_scale"] for name in (Q, K, V)}
        assert found == {name: self.exact(scale.view(torch.float8_e4m3fn)) for name, scale in scales.items()}
        assert found[f"{Q}.weight_scale"] == (-7, 2)

    def test_are_not_read_if_all_scalars_are_equal(self, tmp_path: Path) -> None:
        assert probed(tmp_path).powers == {}


class TestZeroPoints:
    def test_that_are_all_zero_are_in_the_probe_if_the_scheme_is_symmetric(self, tmp_path: Path) -> None:
        """In packed zero points, zero is stored as half of the range."""
        zeros = oracles.pack(torch.zeros(64, 2).long().numpy(), packed_words(4, 0))

        found = probed(tmp_path, "int4-g32-asym", update(weight_zero_point=zeros), symmetric("int4-g32-asym"))

        assert found == Probe(zero=frozenset({f"{Q}.weight_zero_point"}))

    @pytest.mark.parametrize(
        ("last", "zero"),
        [
            (torch.tensor(0, dtype=torch.int8), True),
            (torch.tensor(-1, dtype=torch.int8), False),
            (torch.tensor(-0.0, dtype=torch.bfloat16), True),
            (torch.tensor(1e-30, dtype=torch.bfloat16), False),
            (torch.tensor(float("nan")), False),
            (torch.tensor(float("inf"), dtype=torch.float16), False),
        ],
        ids=str,
    )
    def test_may_be_plain(self, tmp_path: Path, last: Tensor, zero: bool) -> None:
        points = torch.zeros(64, 1, dtype=last.dtype)
        points[63] = last

        found = probed(tmp_path, "int8-channel-asym", update(weight_zero_point=points), symmetric("int8-channel-asym"))

        assert (f"{Q}.weight_zero_point" in found.zero) is zero

    def test_that_contradict_the_weight_are_left_to_the_planner(self, tmp_path: Path) -> None:
        wrong = torch.zeros(3, 7, dtype=torch.int32)

        found = probed(tmp_path, "int4-g32-asym", update(weight_zero_point=wrong), symmetric("int4-g32-asym"))

        assert found.zero == frozenset()

    def test_of_an_asymmetric_scheme_are_never_in_the_probe(self, tmp_path: Path) -> None:
        zeros = oracles.pack(torch.zeros(64, 2).long().numpy(), packed_words(4, 0))

        assert probed(tmp_path, "int4-g32-asym", update(weight_zero_point=zeros)) == NO_PROBE

    def test_of_an_asymmetric_scheme_are_not_in_the_probe_beside_a_symmetric_one(self, tmp_path: Path) -> None:
        zeros = oracles.pack(torch.zeros(64, 2).long().numpy(), packed_words(4, 0))

        found = probed(tmp_path, {"q_proj": "int4-g32-asym", "k_proj": "int4-g32"}, update(weight_zero_point=zeros))

        assert found.zero == frozenset()


class TestGroupIndices:
    CONFIG = LLAMA | {"hidden_size": 128, "intermediate_size": 64}

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize("kind", ["in order", "never filled", "one group for all", "swapped"])
    def test_that_keep_groups_contiguous_are_in_the_probe(self, tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
        index = {
            "in order": torch.arange(128) // 64,
            "never filled": torch.full((128,), -1),
            "one group for all": torch.zeros(128),
            "swapped": 1 - torch.arange(128) // 64,
        }[kind].to(dtype)

        found = probed(tmp_path, "int4-g64-actorder", update(weight_g_idx=index), self.CONFIG)

        trivial = frozenset({f"{Q}.weight_g_idx"} if kind in {"in order", "never filled"} else ())
        assert found == Probe(trivial=trivial)

    def test_of_one_group_are_not_read(self, tmp_path: Path) -> None:
        """Every column has the same group, whatever the index says."""
        in_order = torch.zeros(64, dtype=torch.int32)

        assert probed(tmp_path, "int4-g64-actorder", update(weight_g_idx=in_order)) == NO_PROBE


class TestDamage:
    def test_a_missing_file_is_reported(self, tmp_path: Path) -> None:
        headers = read_of(write_checkpoint(tmp_path, config=LLAMA, scheme="nvfp4").directory)
        (tmp_path / FILE).unlink()

        with pytest.raises(CatalogError, match=FILE):
            probe_checkpoint(*headers)

    def test_a_truncated_file_is_reported(self, tmp_path: Path) -> None:
        headers = read_of(write_checkpoint(tmp_path, config=LLAMA, scheme="nvfp4").directory)
        first = min(tensor.offset for tensor in headers[1].tensors.values())
        (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:first])

        with pytest.raises(CatalogError, match="a file that ends before byte"):
            probe_checkpoint(*headers)

    def test_unknown_names_are_left_to_the_planner(self, tmp_path: Path) -> None:
        config = tiny_config("MistralForCausalLM", layers=1)
        other = {"layers.0.mamba.weight": torch.ones(1)}
        write_native(tmp_path, "nvfp4", config=config, edit=lambda stored: stored.update(other))

        assert open_checkpoint(tmp_path).probe == NO_PROBE
