"""The printed reports: nothing is cut off, and nothing is printed twice."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from builders import tiny_config, write_checkpoint
from hybrid_shape import HybridShape
from rich.console import Console, RenderableType
from unfolded_names import unfold

from trtllm_ct.base.errors import Fault
from trtllm_ct.base.texts import format_bytes
from trtllm_ct.cli import lines, report
from trtllm_ct.cli.folding import fold_names
from trtllm_ct.cli.plan_rows import stored_rows
from trtllm_ct.cli.tables import UnbrokenName
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.pipeline.open import plan_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MIXED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "fp8-channel-token"),
    "o_proj": "int8-g32",
    **dict.fromkeys(("gate_proj", "up_proj"), "int4-g64"),
}


def text(renderable: RenderableType, width: int = 200) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def words(renderable: RenderableType, width: int = 200) -> str:
    """Return the text on one line, with each run of white space as one space."""
    return " ".join(text(renderable, width).split())


def letters(renderable: RenderableType, width: int) -> list[str]:
    """Return all characters except white space and rules; wrapping a cell does not change them."""
    return sorted(re.sub(r"[\s─]", "", text(renderable, width)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", scheme=MIXED, kv=True).directory


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.7e6, "2.7 MB"), (70.5e9, "70.5 GB"), (5e15, "5000.0 TB")],
)
def test_bytes_in_decimal_units(count: float, shown: str) -> None:
    assert format_bytes(count) == shown


class TestInspection:
    def test_detection_table_cache_bytes_and_warnings(self, source: Path):
        shown = words(report.inspection(inspect_checkpoint(source)))

        assert f"{source} is a compressed-tensors checkpoint" in shown
        assert 'evidence: config.json: quantization_config.quant_method is "compressed-tensors"' in shown
        assert "architecture: LlamaForCausalLM, bfloat16" in shown
        assert (
            "model.layers.{0..1}.self_attn.q_proj float-quantized: fp8 channel, input fp8 token dynamic FP8 "
            "FP8_PER_CHANNEL_PER_TOKEN" in shown
        )
        assert "model.layers.{0..1}.mlp.gate_proj pack-quantized: int4 group 64 W4A16_GPTQ W4A16_AWQ g64" in shown
        assert "pack-quantized: int8 group 32 W8A16 dequantized" in shown
        assert "W8A16 holds no scale per group" in shown
        assert "KV cache: FP8" in shown
        assert "Warnings: none" in shown

    def test_the_verdict_comes_first_then_what_costs_most_and_deviations(self, source: Path):
        found = inspect_checkpoint(source)
        shown = words(report.inspection(found))

        parts = [found.verdict, "cost most", "Deviations", "Warnings", "evidence: ", "model.layers"]
        places = [shown.index(part) for part in parts if part != "Deviations" or found.plan.deviations]
        assert places == sorted(places)

    def test_a_reason_is_given_once_below_its_modules(self, source: Path):
        table = words(report.inspection(inspect_checkpoint(source))).partition("KV cache")[2]

        assert table.count("W8A16 holds no scale per group") == 1

    def test_one_line_per_module_on_demand(self, source: Path):
        shown = text(report.inspection(inspect_checkpoint(source), modules=True))

        for module in plan_checkpoint(source).modules:
            assert len(re.findall(rf"{re.escape(module.name)} ", shown)) == 1

    @pytest.mark.parametrize("width", [60, 80, 100, 120, 140])
    def test_a_narrow_terminal_cuts_off_no_text(self, source: Path, width: int):
        """Cells wrap to the next line."""
        shown = report.inspection(inspect_checkpoint(source), modules=True)

        assert letters(shown, width) == letters(shown, 400)

    @pytest.mark.parametrize("width", [60, 80, 100, 120, 140])
    def test_a_narrow_terminal_breaks_no_name(self, source: Path, width: int):
        """Where the table doesn't fit, schemes are listed: all names, schemes, modes and reasons are there, whole."""
        found = inspect_checkpoint(source)

        shown = words(report.inspection(found), width)

        for row in found.rows():
            for phrase in (row.delivered_mode, row.native_mode, *row.reason.split(), *fold_names(row.modules)):
                assert phrase in shown
            assert set(row.stored_scheme.split()) <= {word.strip(",") for word in shown.split()} | set(shown.split())

    def test_a_hybrid_mixture_of_60_layers_is_one_page(self, tmp_path: Path):
        """Layers of one kind repeat with a period, and experts are folded: no name or range is broken at 80 columns."""
        hybrid = HybridShape()
        hybrid.write(tmp_path)

        found = inspect_checkpoint(tmp_path, engine="stock-1.3")
        lines = text(report.inspection(found), 80).splitlines()

        assert not found.problems
        assert len(found.plan.modules if found.plan else ()) > 23_000
        assert len(lines) <= 60
        assert max(map(len, lines)) <= 80
        names = [name for row in found.rows() for name in fold_names(row.modules)]
        assert {line.strip() for line in lines} >= set(names)

    def test_a_list_of_numbers_without_a_period_follows_the_name(self):
        console = Console(width=60, color_system=None)
        name = f"model.layers.{{{','.join(map(str, (1, 4, 5, 9, 16, 22, 23, 30, 41, 42, 50, 57)))}}}.self_attn.q_proj"

        with console.capture() as capture:
            console.print(UnbrokenName(name, indent=4))

        first, *rest = capture.get().splitlines()
        assert first.strip() == "model.layers.*.self_attn.q_proj"
        assert " ".join(" ".join(rest).split()) == "* is 1, 4, 5, 9, 16, 22, 23, 30, 41, 42, 50, 57"

    def test_a_list_that_is_too_long_for_a_line_is_cut(self):
        console = Console(width=60, color_system=None)
        numbers = [number * number for number in range(24)]
        name = f"model.layers.{{{','.join(map(str, numbers))},600..604,700..710..5}}.self_attn.q_proj"

        with console.capture() as capture:
            console.print(UnbrokenName(name, indent=4))

        assert [line.strip() for line in capture.get().splitlines()] == [
            "model.layers.*.self_attn.q_proj",
            "* is one of 32: 0, 1, 4 … 700..710..5",
        ]

    @pytest.mark.parametrize("shown", ["inspection", "plan"])
    def test_one_line_says_which_checks_ran(self, source: Path, shown: str):
        made = inspect_checkpoint(source) if shown == "inspection" else plan_checkpoint(source)

        line = next(line for line in text(getattr(report, shown)(made)).splitlines() if "checked:" in line)

        assert "headers and index" in line
        assert "modules listed for LlamaForCausalLM" in line

    def test_a_smaller_output_is_shown(self, tmp_path: Path):
        """The checkpoint stores a tied lm_head that equals the embeddings, which is not delivered."""

        def store_the_head(stored: dict[str, Tensor]) -> None:
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()

        write_checkpoint(tmp_path, config=tiny_config(tied=True), scheme="int4-g64", edit=store_the_head)

        factor = re.search(r"become [\d.]+ kB \(([\d.]+) x\)", words(report.inspection(inspect_checkpoint(tmp_path))))

        assert factor
        assert float(factor[1]) < 1

    def test_warnings_and_problems_replace_the_table(self, tmp_path: Path):
        write_checkpoint(tmp_path, edit=lambda stored: stored.pop("model.norm.weight"))
        (tmp_path / "model.bin").touch()

        shown = words(report.inspection(inspect_checkpoint(tmp_path)))

        assert "Problems (1): model.norm.weight expected a tensor that LlamaForCausalLM needs" in shown
        assert "No file is missing, so the checkpoint was saved without it" in shown
        assert "KV cache" not in shown


class TestFaults:
    FAULT = Fault(where="model.layers.0.q", expected="a", found="b", remedy="Do this.")

    def test_faults_that_differ_in_the_layer_are_folded(self):
        where = [f"model.layers.{layer}.{name}" for layer in range(3) for name in "qk"]
        faults = [Fault(where=name, expected="a", found="b", remedy="Do this.") for name in where]

        assert text(lines.faults(faults)).splitlines() == [
            "model.layers.{0..2}.q",
            "model.layers.{0..2}.k",
            "  expected a",
            "  found    b",
            "  Do this.",
        ]

    def test_other_faults_are_listed_separately(self):
        other = Fault(where="model.layers.1.q", expected="a", found="c", remedy="Do this.")

        assert text(lines.faults([self.FAULT, other])).count("Do this.") == 2

    def test_brackets_are_shown_as_text(self):
        fault = Fault(where="x[bold]", expected="shape [2, 3]", found="[red]", remedy="See [link].")

        assert words(lines.faults([fault])) == "x[bold] expected shape [2, 3] found [red] See [link]."


class TestPlan:
    def test_every_stored_and_every_delivered_tensor_is_named_with_its_fate(self, source: Path):
        made = plan_checkpoint(source)
        lines = [" ".join(line.split()) for line in text(report.plan(made, unfold=True), 400).splitlines()]

        for fate in made.fates():
            assert f"{fate.name} {fate.spec} {fate.fate} {', '.join(fate.by) or fate.reason}" in lines
        for delivery in made.deliveries():
            assert f"{delivery.name} {delivery.spec} {delivery.operation.label}" in lines
        assert "Delivered to modelopt" in lines

    @pytest.mark.parametrize("width", [60, 80, 100, 120, 140])
    def test_a_narrow_terminal_cuts_no_name(self, source: Path, width: int):
        shown = report.plan(plan_checkpoint(source))

        assert letters(shown, width) == letters(shown, 400)

    def test_tensors_of_all_layers_and_experts_share_a_line(self, tmp_path: Path):
        """A line stands for tensors that are alike in everything but numbers, so that each is told by its line."""
        config = tiny_config("MixtralForCausalLM", layers=2, experts=4)
        write_checkpoint(tmp_path, config=config, scheme="int4-g64")
        made = plan_checkpoint(tmp_path)

        lines = [" ".join(line.split()) for line in text(report.plan(made), 400).splitlines()]

        experts = "model.layers.{0..1}.block_sparse_moe.experts.{0..3}.w1"
        assert any(line.startswith(f"{experts}.weight_packed ") and f"{experts}.weight" in line for line in lines)
        assert sum("experts" in line for line in lines) < len([*made.fates()]) / 4
        shown = {name for line in lines for name in unfold(line.split(" ")[0])}
        assert {fate.name for fate in made.fates()} | {delivery.name for delivery in made.deliveries()} <= shown

    def test_tensors_of_another_fate_have_a_line_of_their_own(self, source: Path):
        """The layers of this checkpoint have different schemes: no line says for one what holds for another."""
        made = plan_checkpoint(source)
        rows = [*stored_rows(made.fates(), unfold=False)]

        fates = {fate.name: (str(fate.spec), str(fate.fate)) for fate in made.fates()}
        told = {name: row.cells[:2] for row in rows for folded in row.names for name in unfold(folded)}
        assert told == fates

    def test_only_tensors_whose_name_matches(self, source: Path):
        shown = text(report.plan(plan_checkpoint(source), matches=re.compile(r"q_proj").search), 400)

        assert "self_attn.q_proj.weight" in shown
        assert "k_proj" not in shown


class TestConversion:
    def test_modes_bytes_files_and_reasons(self, source: Path, tmp_path: Path):
        done = convert_checkpoint(source, tmp_path / "out")

        shown = words(report.conversion(done))

        assert f"Converted to {tmp_path / 'out'} in " in shown
        assert "4 x W4A16_AWQ g64" in shown
        assert "6 x FP8_PER_CHANNEL_PER_TOKEN" in shown
        assert "2 x dequantized" in shown
        assert "files: 1 of weights, 0 side files copied" in shown
        assert "dequantized 2 modules: W8A16 holds no scale per group" in shown

    def test_a_checkpoint_without_quantized_modules(self, tmp_path: Path):
        write_checkpoint(tmp_path / "source", config=tiny_config(layers=1), scheme="dense", kv=True)

        done = convert_checkpoint(tmp_path / "source", tmp_path / "out", to="dense")

        assert "modules: nothing was quantized" in words(report.conversion(done))


class TestVerification:
    def test_the_worst_of_each_kind_with_its_block_and_both_values(self, source: Path, tmp_path: Path):
        convert_checkpoint(source, tmp_path / "out")

        shown = words(report.verification(verify_checkpoint(source, tmp_path / "out")))

        assert shown.startswith(f"{tmp_path / 'out'} against {source}: good (")
        for kind, count in (("native", 10), ("dequantized", 2), ("plain", 13)):
            value = r"-?[\d.e-]+"
            assert re.search(
                rf"{count} {kind} tensors, worst error 0 in [\w.]+, (row \d+, columns \d+-\d+|element \[\d*\]): "
                rf"{value}, source {value}",
                shown,
            )

    def test_a_source_alone_and_its_zero_scales(self, tmp_path: Path):
        name = "model.layers.0.mlp.up_proj.weight_scale"
        write_checkpoint(tmp_path, scheme="int8-g32", edit=lambda stored: stored[name][0].zero_())

        shown = words(report.verification(verify_checkpoint(tmp_path)))

        assert shown == f"{tmp_path}: good (21 modules) 2 rows or groups have scale 0 and hold zeros only"

    def test_faults_follow_the_verdict(self, tmp_path: Path):
        name = "model.layers.0.mlp.up_proj.weight_scale"
        write_checkpoint(tmp_path, scheme="int8-g32", edit=lambda stored: stored[name][0].fill_(-1))

        shown = words(report.verification(verify_checkpoint(tmp_path)))

        assert shown.startswith(f"{tmp_path}: 1 faults (21 modules) {name}[0, 0] expected a finite scale")
