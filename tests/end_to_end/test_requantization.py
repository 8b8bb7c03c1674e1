"""Experts that no kernel holds, rounded to codes on request: from a checkpoint to the logits of each engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from builders import Built, rewrite, tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from safetensors.torch import load_file, save_file

from trtllm_ct.base.errors import PayloadError, PlanError, UsageError
from trtllm_ct.convert import tiles
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.engine.requantization import FORMS, NVFP4_GLOBAL_SCALE, Requantize
from trtllm_ct.pipeline.calibration import asked_requantization, write_calibration
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.reference import load_model
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "mpirun"
MANY_UNITS = """
from trtllm_ct.convert import units
units.UNIT_BYTES = 1
from trtllm_ct.cli.commands import main
main()
"""

EXPERTS = dict.fromkeys(("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"), "int4-g32")
TOKENS = [5, 17, 3, 42, 8, 66, 90, 2, 31, 12, 55, 7]

# The releases and GPUs that have an expert kernel for each form, with the mode of that kernel.
KERNELS = [
    ("fp8-block", "stock-1.0", 90, "FP8_BLOCK_SCALES g128"),
    ("fp8-block", "stock-1.2", 90, "FP8_BLOCK_SCALES g128"),
    ("fp8-block", "stock-1.3", 90, "FP8_BLOCK_SCALES g128"),
    ("mxfp4", "stock-1.0", 90, "W4A16_MXFP4 g32"),
    ("mxfp4", "stock-1.2", 100, "W4A8_MXFP4_MXFP8 g32"),
    ("mxfp4", "stock-1.3", 120, "W4A8_MXFP4_MXFP8 g32"),
    ("nvfp4", "stock-1.3", 100, "W4A16_NVFP4 g16"),
    ("nvfp4-w4a4", "stock-1.0", 100, "NVFP4 g16"),
    ("nvfp4-w4a4", "stock-1.2", 100, "NVFP4 g16"),
    ("nvfp4-w4a4", "stock-1.3", 120, "NVFP4 g16"),
]


def built_mixture(directory: Path, architecture: str = "Qwen3MoeForCausalLM", scheme: str = "int4-g32") -> Built:
    """A mixture whose experts are int4 in groups, and whose attention a mode of every release holds."""
    experts = {} if architecture == "MixtralForCausalLM" else {"moe_intermediate_size": 128}
    config = tiny_config(architecture, hidden=256, intermediate=128, **experts)
    return write_checkpoint(directory, config=config, scheme=dict.fromkeys(EXPERTS, scheme))


def logits_of(directory: Path) -> Tensor:
    model = load_model(directory, dtype=torch.float32, quantize_activations=False)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


@pytest.mark.reference
@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize(("form", "release", "sm", "mode"), KERNELS)
def test_the_engine_computes_with_the_rounded_weights(
    tmp_path: Path, architecture: str, form: str, release: str, sm: int, mode: str
) -> None:
    built = built_mixture(tmp_path / "in", architecture)
    asked = asked_for(form, built, tmp_path / "scales")

    report = convert_checkpoint(built.directory, tmp_path / "out", engine=release, sm=sm, requantize=asked)

    assert {module.delivered_mode for module in report.plan.modules if module.experts} == {mode}
    verified = verify_checkpoint(built.directory, tmp_path / "out", requantize=asked)
    verified.raise_if_bad()
    assert 0 < verified.relative_error <= FORMS[form].usual_error * 1.1
    want = logits_of(tmp_path / "out")
    generation = engine_double.GENERATION_OF[release]
    with (
        engine_double.installed(generation, importers=[BINDINGS], sm=sm) as engine,
        engine.LLM(model=str(tmp_path / "out"), skip_tokenizer_init=True) as llm,
    ):
        got = llm.logits(TOKENS)
    assert float((got - want).abs().max() / want.std()) < 2e-3
    exact = logits_of(built.directory)
    assert float((want - exact).abs().mean() / exact.std()) < 10 * FORMS[form].usual_error


@pytest.mark.parametrize(("tensor", "modes"), [(1, {"FP8_BLOCK_SCALES g128"}), (2, {"dequantized"})])
def test_slices_of_ranks_must_hold_whole_blocks(tmp_path: Path, tensor: int, modes: set[str]) -> None:
    """Experts of 128 rows can't be cut; they stay dequantized, and the reason names both."""
    built = built_mixture(tmp_path / "in")

    plan = plan_checkpoint(
        built.directory, parallel=Parallel(tensor=tensor), requantize=Requantize.parse("experts=fp8-block")
    )

    experts = [module for module in plan.modules if module.experts]
    assert {module.delivered_mode for module in experts} == modes
    if tensor == 2:
        assert "; not requantized to fp8-block: FP8_BLOCK_SCALES at tensor parallel 2: " in experts[0].reason


def test_nothing_is_requantized_unless_it_is_asked_for(tmp_path: Path) -> None:
    built = built_mixture(tmp_path / "in")

    assert not plan_checkpoint(built.directory).requantized
    assert not plan_checkpoint(built.directory, requantize=Requantize.parse("linears=fp8")).requantized


def test_what_a_mode_holds_keeps_its_codes(tmp_path: Path) -> None:
    """Linears of int4 in groups of 128 have a mode; those in groups of 32 have none, and become what was asked for."""
    scheme = {"q_proj": "int4-g128", "k_proj": "int4-g128", "v_proj": "int4-g128", "o_proj": "int4-g128"}
    mlp = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g32")
    built = write_checkpoint(tmp_path / "in", config=tiny_config(hidden=256, intermediate=256), scheme=scheme | mlp)

    plan = plan_checkpoint(built.directory, requantize=Requantize.parse("all=fp8"))

    modes = {module.name.rpartition(".")[2]: module.delivered_mode for module in plan.modules if module.weight}
    assert modes == dict.fromkeys(scheme, "W4A16_AWQ g128") | dict.fromkeys(mlp, "FP8_PER_CHANNEL_PER_TOKEN")
    assert plan.requantized == {"linears": "fp8"}


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int4-g64-actorder", "int8-g64", "nvfp4a16", "fp8-tensor-static"])
def test_any_scheme_is_rounded_from_its_exact_values(tmp_path: Path, scheme: str) -> None:
    """Zero points are folded in first, and groups of any order are read as they are."""
    built = built_mixture(tmp_path / "in", scheme=scheme)
    asked = Requantize.parse("experts=fp8-block")

    report = convert_checkpoint(built.directory, tmp_path / "out", requantize=asked)

    rounded = [module for module in report.plan.modules if module.form]
    if scheme == "fp8-tensor-static":
        assert not rounded  # Stock has a kernel for it.
        return
    verify_checkpoint(built.directory, tmp_path / "out").raise_if_bad()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for module in rounded:
        codes, scale = stored[f"{module.name}.weight"].double(), stored[f"{module.name}.weight_scale"].double()
        rows, columns = codes.shape
        value = codes * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        want = built.dense[f"{module.name}.weight"]
        assert float((value - want).norm() / want.norm()) < FORMS["fp8-block"].usual_error * 1.1


def asked_for(form: str, built: Built, scales: Path) -> Requantize:
    """What asks for experts in a form, with a scale for each of their modules if its kernels read one."""
    if FORMS[form].input_divisor is None:
        return Requantize.parse(f"experts={form}")
    experts = [name.rpartition(".")[0] for name in built.dense if ".experts." in name]
    write_calibration(scales, {name: 2.0**-8 * (1 + position) for position, name in enumerate(experts)})
    return asked_requantization(f"experts={form}", scales)


SM_OF_FORM = {"fp8-block": 90, "nvfp4": 90, "mxfp4": 90, "w4a8-awq": 90, "nvfp4-w4a4": 100}


@pytest.mark.parametrize(
    ("form", "scheme"),
    [
        *((form, "int4-g128") for form in SM_OF_FORM),
        # Words of zero points hold eight rows; w4a8-awq is for symmetric codes.
        *((form, "int4-g128-asym") for form in SM_OF_FORM if form != "w4a8-awq"),
    ],
)
def test_bytes_do_not_depend_on_workers(
    tmp_path: Path, form: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on tiles: those of the last conversions have as few rows as there can be."""
    built = built_mixture(tmp_path / "in", scheme=scheme)
    asked = asked_for(form, built, tmp_path / "scales")
    options: dict[str, Any] = {"engine": "stock-1.3", "sm": SM_OF_FORM[form], "requantize": asked}

    report = convert_checkpoint(built.directory, tmp_path / "1", workers=1, **options)
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    for workers in (2, 4):
        convert_checkpoint(built.directory, tmp_path / str(workers), workers=workers, **options)

    assert report.plan.requantized == {"experts": form}
    one, two, four = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "2", "4"))
    assert one == two == four


@pytest.mark.mpi
@pytest.mark.parametrize("form", SM_OF_FORM)
def test_an_mpi_job_writes_the_same_bytes(tmp_path: Path, form: str) -> None:
    """Both ranks convert some of many units, and each makes the plan itself, with the same scales."""
    built = built_mixture(tmp_path / "in", scheme="int4-g128")
    asked, sm = asked_for(form, built, tmp_path / "scales"), SM_OF_FORM[form]
    convert_checkpoint(built.directory, tmp_path / "threads", engine="stock-1.3", sm=sm, requantize=asked)
    words = ["--engine", "stock-1.3", "--sm", str(sm), "--requantize", f"experts={form}"]
    words += ["--calibration", str(tmp_path / "scales")] if asked.reads_calibration else []

    done = subprocess.run(
        [
            *(MPIRUN, "-n", "2", sys.executable, "-c", MANY_UNITS, "convert", str(built.directory)),
            *(str(tmp_path / "mpi"), *words, "--executor", "mpi"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    threads, ranks = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("threads", "mpi")
    )
    assert threads == ranks


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixture, and the directory whose experts have FP8 block scales."""
    work = tmp_path_factory.mktemp("requantized")
    built = built_mixture(work / "in")
    convert_checkpoint(built.directory, work / "out", requantize=Requantize.parse("experts=fp8-block"))
    return built.directory, work / "out"


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_of_inputs_that_is_none_is_found(tmp_path: Path, value: float) -> None:
    """Whether or not `verify` is given the calibration."""
    built = built_mixture(tmp_path / "in", scheme="int4-g128")
    asked = asked_for("w4a8-awq", built, tmp_path / "scales")
    convert_checkpoint(built.directory, tmp_path / "out", sm=90, requantize=asked)
    name = "model.layers.1.mlp.experts.2.up_proj.input_scale"

    rewrite(tmp_path / "out", lambda stored: stored[name].fill_(value))

    for given in (None, asked):
        faults = verify_checkpoint(built.directory, tmp_path / "out", requantize=given).faults
        assert [fault.where.partition(",")[0] for fault in faults] == [name]


def test_a_calibration_without_scales_of_the_directory_is_another_one(tmp_path: Path) -> None:
    """A file of another model says nothing about this one, so nothing was compared."""
    built = built_mixture(tmp_path / "in", scheme="int4-g128")
    asked = asked_for("w4a8-awq", built, tmp_path / "scales")
    convert_checkpoint(built.directory, tmp_path / "out", sm=90, requantize=asked)
    one, *others = sorted(asked.calibration.scales)
    for name, scales in {"model": {"another.model": 1.0}, "part": {one: asked.calibration.scales[one]}}.items():
        write_calibration(tmp_path / name, scales)
        other = asked_requantization("experts=w4a8-awq", tmp_path / name)

        faults = verify_checkpoint(built.directory, tmp_path / "out", requantize=other).faults

        missing = {f"{module}.input_scale" for module in (others if name == "part" else [one, *others])}
        assert missing <= {fault.where for fault in faults if fault.found == "none"}


def test_names_of_the_model_mean_the_same_to_convert_and_verify(tmp_path: Path) -> None:
    """The files of a LoRA wrapper call a module by another name than its calibration does."""
    built = built_mixture(tmp_path / "in", scheme="int4-g128")
    asked = asked_for("w4a8-awq", built, tmp_path / "scales")
    path = built.directory / "model.safetensors"
    stored = {re.sub(r"(experts\..*_proj)", r"\1.base_layer", name): each for name, each in load_file(path).items()}
    save_file(stored, path)

    convert_checkpoint(built.directory, tmp_path / "out", sm=90, requantize=asked)

    assert verify_checkpoint(built.directory, tmp_path / "out", requantize=asked).good


@pytest.mark.parametrize("given", [False, True])
def test_a_scale_of_inputs_that_is_missing_is_found(tmp_path: Path, given: bool) -> None:
    built = built_mixture(tmp_path / "in", scheme="int4-g128")
    asked = asked_for("nvfp4-w4a4", built, tmp_path / "scales")
    convert_checkpoint(built.directory, tmp_path / "out", sm=100, requantize=asked)
    name = "model.layers.1.mlp.experts.2.down_proj.input_scale"

    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    del stored[name]
    save_file(stored, path)

    faults = verify_checkpoint(built.directory, tmp_path / "out", requantize=asked if given else None).faults
    assert name in {fault.where for fault in faults}


class TestVerification:
    """`verify` finds what is wrong with rounded codes, and accepts no other directory for a rounded one."""

    @pytest.mark.parametrize(
        "damage",
        [
            lambda codes, _: codes.view(torch.uint8)[0, 0].bitwise_xor_(1),
            lambda codes, _: codes.view(torch.uint8).bitwise_xor_(0x80),
            lambda _, scale: scale.mul_(1.5),
            lambda _, scale: scale.mul_(-1),
            lambda codes, _: codes.view(torch.uint8).copy_(codes.view(torch.uint8).flip(0)),
        ],
        ids=["a code", "signs", "scales", "negative scales", "rows"],
    )
    def test_a_damage_is_found(self, converted: tuple[Path, Path], tmp_path: Path, damage: Any) -> None:
        source, out = converted
        shutil.copytree(out, tmp_path / "out")
        name = "model.layers.1.mlp.experts.2.up_proj"

        rewrite(tmp_path / "out", lambda stored: damage(stored[f"{name}.weight"], stored[f"{name}.weight_scale"]))

        found = verify_checkpoint(source, tmp_path / "out").faults
        assert any(fault.where.startswith(name) for fault in found)

    def test_gate_and_up_can_not_be_swapped(self, converted: tuple[Path, Path], tmp_path: Path) -> None:
        source, out = converted
        shutil.copytree(out, tmp_path / "out")
        gate, up = (f"model.layers.0.mlp.experts.1.{name}_proj" for name in ("gate", "up"))

        def swap(stored: dict[str, Tensor]) -> None:
            for local in ("weight", "weight_scale", "weight_scale_inv"):
                stored[f"{gate}.{local}"], stored[f"{up}.{local}"] = stored[f"{up}.{local}"], stored[f"{gate}.{local}"]

        rewrite(tmp_path / "out", swap)

        assert {
            fault.where.partition(".weight")[0] for fault in verify_checkpoint(source, tmp_path / "out").faults
        } == {
            gate,
            up,
        }

    def test_the_record_decides_what_may_differ(self, converted: tuple[Path, Path], tmp_path: Path) -> None:
        source, out = converted
        shutil.copytree(out, tmp_path / "out")
        path = tmp_path / "out" / "hf_quant_config.json"
        document = json.loads(path.read_text())
        assert document["planned_for"].pop("requantized") == {"experts": "fp8-block"}
        path.write_text(json.dumps(document))

        assert len(verify_checkpoint(source, tmp_path / "out").faults) == 24
        asked = Requantize.parse("experts=fp8-block")
        assert verify_checkpoint(source, out, requantize=asked).good
        other = verify_checkpoint(source, out, requantize=Requantize.parse("experts=nvfp4")).faults
        assert other[0].found == "--requantize experts=fp8-block"


def test_modules_that_keep_their_codes_are_compared_strictly(tmp_path: Path) -> None:
    """The record names all Linears, but those of attention have a mode: a wrong code of theirs is found."""
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "int8-channel")
    mlp = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "int4-g32")
    built = write_checkpoint(tmp_path / "in", config=tiny_config(hidden=256, intermediate=256), scheme=attention | mlp)
    convert_checkpoint(built.directory, tmp_path / "out", requantize=Requantize.parse("linears=fp8"))
    assert len(verify_checkpoint(built.directory, tmp_path / "out").relative_errors) == 6
    name = "model.layers.0.self_attn.o_proj.weight"

    rewrite(tmp_path / "out", lambda stored: stored[name].add_((stored[name] == 66).to(torch.int8)))

    assert [fault.where.partition(",")[0] for fault in verify_checkpoint(built.directory, tmp_path / "out").faults] == [
        name
    ]


@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4a16"])
def test_codes_of_the_form_are_not_rounded_again(tmp_path: Path, scheme: str) -> None:
    config = tiny_config(hidden=256, intermediate=256)
    built = write_checkpoint(tmp_path / "in", config=config, scheme=scheme)

    plan = plan_checkpoint(built.directory, engine="stock-1.3", sm=90, requantize=Requantize.parse("linears=nvfp4"))

    assert not plan.requantized


class TestRefusals:
    """What can't be done is said before anything is written."""

    @pytest.mark.parametrize("words", ["experts", "experts=int4", "heads=fp8", "experts=fp8-block,", ""])
    def test_other_words_are_usage_errors(self, words: str) -> None:
        with pytest.raises(UsageError, match="experts=FORM"):
            Requantize.parse(words)

    @pytest.mark.parametrize("to", ["dense", "engine"])
    def test_targets_without_kernels(self, tmp_path: Path, to: str) -> None:
        built = built_mixture(tmp_path / "in")

        with pytest.raises(UsageError, match=f"target {to}"):
            convert_checkpoint(built.directory, tmp_path / "out", to=to, requantize=Requantize.parse("all=fp8"))

        assert not (tmp_path / "out").exists()

    def test_values_beyond_the_form(self, tmp_path: Path) -> None:
        """NVFP4 has one global scale for all weights; a value that is too large for it is named."""
        name = "model.layers.0.mlp.experts.3.down_proj.weight_scale"
        built = built_mixture(tmp_path / "in")
        rewrite(built.directory, lambda stored: stored[name][5, 1].fill_(2.0**12 * NVFP4_GLOBAL_SCALE))

        with pytest.raises(PayloadError, match=r"experts\.3\.down_proj") as raised:
            convert_checkpoint(
                built.directory, tmp_path / "out", engine="stock-1.3", requantize=Requantize.parse("experts=nvfp4")
            )

        assert "fp8-block" in raised.value.faults[0].remedy
        assert not (tmp_path / "out").exists()

    def test_strict_accepts_what_was_asked_for(self, tmp_path: Path) -> None:
        built = built_mixture(tmp_path / "in")

        with pytest.raises(PlanError):
            plan_checkpoint(built.directory, strict=True)

        assert plan_checkpoint(built.directory, strict=True, requantize=Requantize.parse("experts=fp8-block"))


def test_an_inspection_names_the_price(tmp_path: Path) -> None:
    built = built_mixture(tmp_path / "in")

    found = inspect_checkpoint(built.directory, requantize=Requantize.parse("experts=fp8-block"))

    assert found.plan is not None
    notes = [deviation.note for deviation in found.plan.deviations]
    assert any("weights are rounded to fp8-block, with a relative error of at most 6%" in note for note in notes)
    assert any("activations are fp8 dynamic per group of 128" in note for note in notes)
