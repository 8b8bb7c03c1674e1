"""Checkpoints in the formats that the library dropped, end to end: sparse-bitmask, sparse-24-bitmask and marlin-24.

Each is compared with a twin of the same values in a format that is in use: all that is delivered must be equal.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import rewrite, rewrite_config, tiny_config, write_checkpoint
from on_tensors import Codes, encode, stream_delivered
from safetensors.torch import load_file
from stored_schemes import SCHEMES

from trtllm_ct.base.errors import PlanError
from trtllm_ct.base.schemes import QuantArgs, Strategy
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.formats.marlin_24 import MARLIN_24
from trtllm_ct.formats.sparse.compressed_io import load_compressed, save_compressed
from trtllm_ct.layouts.packing import INT8_PLAIN
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import open_checkpoint, plan_checkpoint
from trtllm_ct.plan.plan import Fate
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

WEIGHTS = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj"
NAMES = [("sparse-bitmask", "0.4"), ("sparse-bitmask", "0.9"), ("sparse-24-bitmask", "0.9")]
# Formats whose codes are a `weight`, which the sparse formats of 0.9 and later compress.
STACKED = ("dense", "fp8-tensor-static", "fp8-channel-token", "fp8-block", "int8-plain-channel-asym", "w8a8")


def drop_half(stored: dict[str, Tensor]) -> None:
    """Every second column of every Linear's codes becomes zero: also two of four."""
    for name in [name for name in stored if name.endswith(("proj.weight", "lm_head.weight"))]:
        stored[name] = torch.where(torch.arange(stored[name].shape[1]) % 2 == 0, zero(stored[name]), stored[name])


def zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype)


def write_twin(directory: Path, scheme: str, **options: Any) -> Path:
    config = {"config": tiny_config(hidden=128, kv_heads=4), "edit": drop_half}
    return write_checkpoint(directory, scheme=scheme, **(config | options)).directory


def make_sparse(source: Path, directory: Path, kind: str, generation: Any) -> Path:
    """The same checkpoint with a sparse layer on the outside."""
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["sparsity_config"] = {"format": kind, "targets": ["Linear"], "ignore": []}
    (directory / "config.json").write_text(json.dumps(config))
    save_compressed(load_file(source / WEIGHTS), directory / WEIGHTS, kind, generation=generation)
    return directory


def delivered(directory: Path, to: str) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(directory)
    plan = checkpoint.plan(to)
    return {
        name: tensor.clone()
        for _, tensors in stream_delivered(plan, checkpoint.catalog)
        for name, tensor in tensors.items()
    }


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].double(), tensor.double()), name


class TestSparse:
    @pytest.mark.parametrize(("kind", "generation"), NAMES)
    @pytest.mark.parametrize("scheme", STACKED)
    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_what_is_delivered_is_that_of_the_dense_twin(
        self, tmp_path: Path, scheme: str, kind: str, generation: str, to: str
    ):
        twin = write_twin(tmp_path / "twin", scheme)
        sparse = make_sparse(twin, tmp_path / "sparse", kind, generation)

        want, got = plan_checkpoint(twin, to), plan_checkpoint(sparse, to)

        assert got.delivered_specs == want.delivered_specs
        assert got.quant_config == want.quant_config
        assert got.warnings == want.warnings
        assert_same(delivered(sparse, to), delivered(twin, to))

    @pytest.mark.parametrize("scheme", ["int4-g64", "int4-channel-asym", "int8-channel"])
    def test_packed_codes_were_compressed_by_the_first_generation_only(self, tmp_path: Path, scheme: str):
        """It stored every tensor in pieces: words, scales and shapes."""
        twin = write_twin(tmp_path / "twin", scheme, edit=None)
        sparse = make_sparse(twin, tmp_path / "sparse", "sparse-bitmask", "0.4")

        assert f"{Q}.weight_packed.bitmask" in load_file(sparse / WEIGHTS)
        assert_same(delivered(sparse, "modelopt"), delivered(twin, "modelopt"))

    @pytest.mark.parametrize(("kind", "generation"), NAMES)
    def test_columns_that_no_byte_divides(self, tmp_path: Path, kind: str, generation: str):
        """A bitmask alone leaves open how many of its last eight columns there are."""
        twin = write_twin(tmp_path / "twin", "w8a8", config=tiny_config(hidden=36, intermediate=60))
        sparse = make_sparse(twin, tmp_path / "sparse", kind, generation)

        assert_same(delivered(sparse, "dense"), delivered(twin, "dense"))

    @pytest.mark.parametrize("family", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
    def test_experts(self, tmp_path: Path, family: str):
        def drop(stored: dict[str, Tensor]) -> None:
            for name in [name for name in stored if name.endswith(".weight") and stored[name].dim() == 2]:
                stored[name][:, ::2] = 0

        twin = write_twin(tmp_path / "twin", "w8a8", config=tiny_config(family), edit=drop)
        sparse = make_sparse(twin, tmp_path / "sparse", "sparse-24-bitmask", "0.9")

        assert_same(delivered(sparse, "modelopt"), delivered(twin, "modelopt"))

    @pytest.mark.parametrize(("kind", "generation"), NAMES)
    def test_every_piece_has_one_fate(self, tmp_path: Path, kind: str, generation: str):
        sparse = make_sparse(write_twin(tmp_path / "twin", "w8a8"), tmp_path / "sparse", kind, generation)
        stored = load_file(sparse / WEIGHTS)

        fates = {fate.name: fate for fate in plan_checkpoint(sparse).fates()}

        assert list(fates) == list(stored)
        assert sum(fate.spec.nbytes for fate in fates.values()) == sum(tensor.nbytes for tensor in stored.values())
        pieces = [fate for name, fate in fates.items() if name.startswith(Q) and "scale" not in name]
        assert {fate.name.rpartition(".")[2] for fate in pieces} >= {"shape", "compressed", "bitmask"}
        assert {fate.fate for fate in pieces} == {Fate.CONSUMED}
        assert all(f"{Q}.weight" in fate.by for fate in pieces)

    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_a_converted_directory_is_verified_and_has_no_sparsity(self, tmp_path: Path, to: str):
        sparse = make_sparse(
            write_twin(tmp_path / "twin", "fp8-channel-token"), tmp_path / "sparse", "sparse-24-bitmask", "0.9"
        )

        convert_checkpoint(sparse, tmp_path / "out", to=to)

        assert verify_checkpoint(sparse, tmp_path / "out").faults == ()
        assert not [name for name in load_file(tmp_path / "out" / WEIGHTS) if name.endswith(("bitmask", "compressed"))]
        assert "sparsity_config" not in (tmp_path / "out" / "config.json").read_text()

    @pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
    def test_sparsity_alone_in_the_block_of_early_releases(self, tmp_path: Path, key: str):
        """They wrote no method and no groups."""
        twin = write_twin(tmp_path / "twin", "dense")
        sparse = make_sparse(twin, tmp_path / "sparse", "sparse-bitmask", "0.4")

        def early(document: dict[str, Any]) -> None:
            block = document.pop("quantization_config")
            document[key] = {"sparsity_config": block["sparsity_config"]}

        rewrite_config(sparse, early)

        assert_same(delivered(sparse, "dense"), delivered(twin, "dense"))
        assert delivered(sparse, "dense").keys() == dict(load_compressed(sparse)).keys()

    def test_a_text_model_under_a_prefix(self, tmp_path: Path):
        """Its shapes are looked up under the names of the files."""

        def place(stored: dict[str, Tensor]) -> None:
            drop_half(stored)
            for name in [name for name in stored if name.startswith("model.")]:
                stored[f"model.language_model.{name.removeprefix('model.')}"] = stored.pop(name)

        def nest(document: dict[str, Any]) -> None:
            text = {key: document.pop(key) for key in list(document) if key != "quantization_config"}
            document |= {"architectures": ["LlavaForConditionalGeneration"], "text_config": text}

        config = tiny_config(hidden=36, intermediate=60)
        twin = write_twin(tmp_path / "twin", "w8a8", config=config, edit=place)
        rewrite_config(twin, nest)
        sparse = make_sparse(twin, tmp_path / "sparse", "sparse-24-bitmask", "0.9")

        assert_same(delivered(sparse, "modelopt"), delivered(twin, "modelopt"))

    def test_pieces_that_contradict_the_model_are_refused(self, tmp_path: Path):
        sparse = make_sparse(write_twin(tmp_path / "twin", "w8a8"), tmp_path / "sparse", "sparse-bitmask", "0.9")
        rewrite_config(sparse, lambda document: document.update(intermediate_size=256))

        with pytest.raises(PlanError) as caught:
            plan_checkpoint(sparse)

        assert {fault.where.split(".")[4] for fault in caught.value.faults} == {"gate_proj", "up_proj", "down_proj"}

    def test_inspect_names_the_row(self, tmp_path: Path):
        sparse = make_sparse(write_twin(tmp_path / "twin", "w8a8"), tmp_path / "sparse", "sparse-bitmask", "0.9")

        report = json.dumps(inspect_checkpoint(sparse).to_dict())

        assert "int-quantized: int8 channel, input int8 token dynamic" in report
        assert "unknown" not in report


MARLIN = ("int4-plain-g64", "int8-plain-channel", "int8-plain-g32", "w4a8")


def make_marlin(twin: Path, directory: Path, scheme: str, version: str | None) -> Path:
    """The same checkpoint with its Linears as marlin-24, which holds weight-only schemes; the twin's loses activations.

    Releases up to 0.7 kept the scales of groups in order.
    """
    arguments = SCHEMES[scheme].weights
    args = QuantArgs(
        num_bits=arguments["num_bits"],
        strategy=Strategy(arguments["strategy"]),
        group_size=arguments["group_size"],
    )
    early = version is not None and tuple(int(part) for part in version.split(".")) < (0, 8)

    def arrange(stored: dict[str, Tensor]) -> None:
        for name in [name for name in stored if name.endswith("proj.weight")]:
            module = name.removesuffix(".weight")
            codes, scale = stored.pop(name), stored.pop(f"{module}.weight_scale")
            values = Codes(values=codes, packing=INT8_PLAIN, shape=tuple(codes.shape), scale=scale)
            tensors = encode(MARLIN_24, values, args)
            if early:
                tensors["scale_packed"] = scale.T.contiguous()
            stored |= {f"{module}.{local}": tensor for local, tensor in tensors.items()}

    def weight_only(document: dict[str, Any]) -> None:
        document["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None

    def declare(document: dict[str, Any]) -> None:
        block = document["quantization_config"]
        block |= {"format": "marlin-24", "version": version}
        block["config_groups"]["group_0"]["format"] = "marlin-24"

    rewrite_config(twin, weight_only)
    directory.mkdir()
    for name in ("config.json", WEIGHTS):
        (directory / name).write_bytes((twin / name).read_bytes())
    rewrite(directory, arrange)
    rewrite_config(directory, declare)
    return directory


class TestMarlin:
    """Codes with their zeros put back: then rows of int4 and int8 like others."""

    CONFIG = tiny_config(hidden=256, kv_heads=4, intermediate=256, layers=1)

    @pytest.mark.parametrize("scheme", MARLIN)
    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    @pytest.mark.parametrize("version", ["0.6.0", "0.14.0"])
    def test_what_is_delivered_is_that_of_the_plain_twin(self, tmp_path: Path, scheme: str, to: str, version: str):
        twin = write_twin(tmp_path / "twin", scheme, config=self.CONFIG, scale_dtype=torch.float16)
        marlin = make_marlin(twin, tmp_path / "marlin", scheme, version)

        want, got = plan_checkpoint(twin, to), plan_checkpoint(marlin, to)

        assert got.delivered_specs == want.delivered_specs
        assert got.quant_config == want.quant_config
        forgotten = version == "0.6.0" and SCHEMES[scheme].weights["strategy"] == "group"
        assert ["forgot to interleave" in warning for warning in got.warnings] == [True] * forgotten
        assert_same(delivered(marlin, to), delivered(twin, to))

    @pytest.mark.parametrize("options", [{}, {"sm": 80, "untested": True}, {"sm": 90, "untested": True}], ids=str)
    def test_files_of_ranks_are_those_of_the_plain_twin(self, tmp_path: Path, options: dict[str, Any]):
        """Its rows can't be read one by one, so that ranks get slices of what is delivered."""
        twin = write_twin(tmp_path / "twin", "int4-plain-g64", config=self.CONFIG, scale_dtype=torch.float16)
        marlin = make_marlin(twin, tmp_path / "marlin", "int4-plain-g64", "0.14.0")
        for source in (twin, marlin):
            out = tmp_path / f"of-{source.name}"
            convert_checkpoint(source, out, to="engine", parallel=Parallel(tensor=2), **options)

        for rank in range(2):
            want, got = (
                {key: tensor.view(torch.uint8) for key, tensor in load_file(folder / f"rank{rank}.safetensors").items()}
                for folder in (tmp_path / "of-twin", tmp_path / "of-marlin")
            )
            assert_same(got, want)

    @pytest.mark.parametrize(
        ("scheme", "mode"),
        [("int4-plain-g64", "W4A16_AWQ g64"), ("w4a8", "W4A16"), ("int8-plain-channel", "W8A16")],
    )
    def test_native_modes(self, tmp_path: Path, scheme: str, mode: str):
        twin = write_twin(tmp_path / "twin", scheme, config=self.CONFIG, scale_dtype=torch.float16)
        marlin = make_marlin(twin, tmp_path / "marlin", scheme, "0.14.0")

        module = plan_checkpoint(marlin).module(Q)

        assert module.delivered_mode == mode
        assert module.stored_scheme.startswith("marlin-24: int")
        assert module.note == ""

    @pytest.mark.parametrize(("scheme", "told"), [("int4-plain-g64", True), ("int8-plain-channel", False)])
    def test_the_order_of_group_scales_is_a_guess_where_no_release_is_named(
        self, tmp_path: Path, scheme: str, told: bool
    ):
        twin = write_twin(tmp_path / "twin", scheme, config=self.CONFIG, scale_dtype=torch.float16)
        marlin = make_marlin(twin, tmp_path / "marlin", scheme, None)

        plan = plan_checkpoint(marlin)

        warning = "marlin-24 of an unknown release: group scales read in the order of 0.8.0 and later (7 modules)"
        assert plan.warnings == ((warning,) if told else ())
        assert_same(delivered(marlin, "dense"), delivered(twin, "dense"))

    @pytest.mark.parametrize("to", ["modelopt", "dense"])
    def test_a_converted_directory_is_verified(self, tmp_path: Path, to: str):
        twin = write_twin(tmp_path / "twin", "int4-plain-g64", config=self.CONFIG, scale_dtype=torch.float16)
        marlin = make_marlin(twin, tmp_path / "marlin", "int4-plain-g64", "0.14.0")

        convert_checkpoint(marlin, tmp_path / "out", to=to)

        assert verify_checkpoint(marlin, tmp_path / "out").faults == ()

    def test_every_tensor_has_one_fate(self, tmp_path: Path):
        twin = write_twin(tmp_path / "twin", "int4-plain-g64", config=self.CONFIG, scale_dtype=torch.float16)
        marlin = make_marlin(twin, tmp_path / "marlin", "int4-plain-g64", "0.14.0")

        fates = {fate.name: fate for fate in plan_checkpoint(marlin).fates()}

        assert fates.keys() == load_file(marlin / WEIGHTS).keys()
        for local in ("weight_packed", "scale_packed", "meta"):
            assert fates[f"{Q}.{local}"].fate is Fate.CONSUMED

    @pytest.mark.parametrize("lost", ["scale_packed", "meta", "weight_packed"])
    def test_a_lost_tensor_is_named(self, tmp_path: Path, lost: str):
        twin = write_twin(tmp_path / "twin", "int4-plain-g64", config=self.CONFIG, scale_dtype=torch.float16)
        marlin = make_marlin(twin, tmp_path / "marlin", "int4-plain-g64", "0.14.0")
        rewrite(marlin, lambda stored: stored.pop(f"{Q}.{lost}"))

        with pytest.raises(PlanError) as caught:
            plan_checkpoint(marlin)

        assert all(fault.where.startswith(Q) for fault in caught.value.faults)
