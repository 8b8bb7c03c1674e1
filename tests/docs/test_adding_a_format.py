"""docs/adding-a-format.md, followed to the letter: its changes alone make a format that everything else can use."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from page_changes import ROOT, apply_page, copy_of_package, listed_files, run_in

if TYPE_CHECKING:
    from pathlib import Path

PAGE = ROOT / "docs" / "adding-a-format.md"

# A checkpoint in the format of the page, from one of int8 codes: a shift for each row, and scales smaller by it.
WRITE = """
import sys
from pathlib import Path
import torch
from builders import rewrite, rewrite_config, tiny_config, write_checkpoint

def shifted(stored):
    for name in [name for name in stored if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        shift = torch.arange(len(stored[name])) % 5 - 2
        stored[name] = torch.ldexp(stored[name].float(), -shift.reshape(-1, 1)).to(stored[name].dtype)
        stored[f"{module}.weight_shift"] = shift.to(torch.int8)
        stored[f"{module}.weight_codes"] = stored.pop(f"{module}.weight")
        if f"{module}.weight_zero_point" in stored:
            stored[f"{module}.weight_offset"] = stored.pop(f"{module}.weight_zero_point")

def declared(config):
    block = config["quantization_config"]
    block["format"] = block["config_groups"]["group_0"]["format"] = "row-shifted"

def written(directory, scheme="int8-plain-channel", **config):
    built = write_checkpoint(Path(directory), config=tiny_config(**config), scheme=scheme)
    rewrite(Path(directory), shifted)
    rewrite_config(Path(directory), declared)
    return built
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_of_package(tmp_path_factory.mktemp("format"))
    apply_page(PAGE, root)
    return root


def test_the_page_lists_the_files_that_it_changes(tmp_path: Path) -> None:
    assert apply_page(PAGE, copy_of_package(tmp_path)) == listed_files(PAGE)


def test_its_code_passes_the_linters(changed: Path) -> None:
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), "trtllm_ct", "docs"]
        done = subprocess.run(command, cwd=changed, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_zero_points_may_have_a_name_of_their_own(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import convert_checkpoint, inspect_checkpoint, verify_checkpoint
from trtllm_ct.convert import tiles

source, out = sys.argv[1:]
built = written(source, "int8-plain-channel-asym")
module = inspect_checkpoint(source, "modelopt").plan.module("model.layers.0.mlp.down_proj")
assert module.weight.zero_point == "weight_offset" and module.dequantized
tiles.TILE_BYTES = 2048
convert_checkpoint(source, out, to="modelopt")
verified = verify_checkpoint(source, out)
assert verified.good, verified.faults
"""
    run_in(changed, code, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("target", ["modelopt", "dense"])
def test_a_checkpoint_is_converted_in_tiles_and_verified(changed: Path, tmp_path: Path, target: str) -> None:
    """The shift, which has rows as the codes have, is cut with them."""
    code = f"""{WRITE}
from trtllm_ct import convert_checkpoint, inspect_checkpoint, verify_checkpoint
from trtllm_ct.convert import tiles
from trtllm_ct.plan.ranks.narrow import can_narrow

source, out, target = sys.argv[1:]
written(source)
plan = inspect_checkpoint(source, target).plan
module = plan.module("model.layers.0.mlp.down_proj")
assert module.weight.format.name == "row-shifted" and can_narrow(module)
assert module.delivered_mode == ("W8A16" if target == "modelopt" else "dequantized"), module.delivered_mode
tiles.TILE_BYTES = 2048
convert_checkpoint(source, out, to=target)
verified = verify_checkpoint(source, out)
assert verified.good and len(verified.checks) > 10, verified.faults
"""
    run_in(changed, code, tmp_path / "in", tmp_path / "out", target)


def test_weights_and_ranks_get_the_values_that_were_stored(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import CompressedTensorsWeightLoader, open_checkpoint
from trtllm_ct.engine.parallel import Parallel, Rank
from trtllm_ct.pipeline.stream import stream_delivered
from trtllm_ct.plan.ranks.shard import plan_for_rank

built = written(sys.argv[1])
weights = CompressedTensorsWeightLoader().load_weights(sys.argv[1], layout="dense")
for name, exact in built.dense.items():
    assert torch.allclose(weights[name].double(), exact, rtol=2**-8, atol=0), name

checkpoint = open_checkpoint(sys.argv[1])
parallel = Parallel(tensor=2)
plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
rank = Rank(parallel=parallel, tensor=1)
name = "model.layers.0.mlp.gate_proj"
share = plan_for_rank(plan, checkpoint.model, rank).module(name).share
assert (share.begin, share.end) == (64, 128)
assert share.module.views["weight_shift"].spec.shape == (64,)
"""
    run_in(changed, code, tmp_path / "in")


def test_fused_experts_are_taken_apart(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import inspect_checkpoint, CompressedTensorsWeightLoader

built = write_checkpoint(Path(sys.argv[1]), config=tiny_config("Qwen3MoeForCausalLM"), scheme="int8-plain-channel")
rewrite(Path(sys.argv[1]), shifted)
rewrite_config(Path(sys.argv[1]), declared)

def fused(stored):
    for layer in range(2):
        prefix = f"model.layers.{{layer}}.mlp.experts."
        count = len({{name.split(".")[5] for name in stored if name.startswith(prefix)}})
        for local in ("weight_codes", "weight_scale", "weight_shift"):
            pop = lambda leaf: [stored.pop(f"{{prefix}}{{expert}}.{{leaf}}.{{local}}") for expert in range(count)]
            gate, up, down = map(pop, ("gate_proj", "up_proj", "down_proj"))
            pairs = [torch.cat(pair) for pair in zip(gate, up)]
            stored[f"{{prefix}}gate_up_proj.{{local}}"] = torch.stack(pairs)
            stored[f"{{prefix}}down_proj.{{local}}"] = torch.stack(down)

rewrite(Path(sys.argv[1]), fused)
weights = CompressedTensorsWeightLoader().load_weights(sys.argv[1], layout="dense")
name = "model.layers.1.mlp.experts.1.up_proj.weight"
assert torch.allclose(weights[name].double(), built.dense[name], rtol=2**-8, atol=0)
"""
    run_in(changed, code, tmp_path)


def test_a_missing_companion_is_a_fault(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import inspect_checkpoint

written(sys.argv[1])
rewrite(Path(sys.argv[1]), lambda stored: stored.pop("model.layers.0.mlp.down_proj.weight_shift"))
problems = inspect_checkpoint(sys.argv[1]).problems
assert [fault.where for fault in problems] == ["model.layers.0.mlp.down_proj.weight_shift"], problems
"""
    run_in(changed, code, tmp_path)


def test_the_support_matrix_has_a_row_for_it(changed: Path) -> None:
    """The table of this format alone: planning all others takes as long as `make docs`."""
    code = """
import sys
sys.path.insert(0, "docs")
import generate_support_matrix as matrix

matrix.FORMATS = tuple(entry for entry in matrix.FORMATS if entry.name == "row-shifted")
print(matrix.scheme_table(matrix.LINEAR))
"""
    rows = [line for line in run_in(changed, code).splitlines() if "row-shifted" in line]

    assert len(rows) == 1
    assert "int8" in rows[0]
    assert "`W8A16`" in rows[0]
