"""docs/adding-a-mode-or-release.md, followed to the letter: a mode and a release that everything else can use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from page_changes import ROOT, apply_page, copy_of_package, listed_files, run_in

if TYPE_CHECKING:
    from pathlib import Path

PAGE = ROOT / "docs" / "adding-a-mode-or-release.md"
WRITE = """
import sys
from pathlib import Path
from builders import tiny_config, write_checkpoint

built = write_checkpoint(Path(sys.argv[1]), config=tiny_config(), scheme="int8-g32", tokenizer=True)
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_of_package(tmp_path_factory.mktemp("mode"))
    apply_page(PAGE, root)
    return root


def test_the_page_lists_the_files_that_it_changes(tmp_path: Path) -> None:
    assert apply_page(PAGE, copy_of_package(tmp_path)) == listed_files(PAGE)


def test_only_the_new_release_has_the_mode(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import plan_checkpoint

name = "model.layers.0.mlp.down_proj"
older = plan_checkpoint(sys.argv[1], "modelopt", engine="stock-1.3").module(name)
assert older.dequantized and older.reason == "stock-1.3 has no W8A16_GROUP Linear; stock-1.4 has one", older.reason
plan = plan_checkpoint(sys.argv[1], "modelopt", engine="stock-1.4")
assert {{module.delivered_mode for module in plan.modules if module.weight}} == {{"W8A16_GROUP g32"}}
assert plan.quant_config.to_dict()["group_size"] == 32
"""
    run_in(changed, code, tmp_path)


def test_a_checkpoint_is_converted_and_verified_in_it(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import convert_checkpoint, verify_checkpoint

convert_checkpoint(sys.argv[1], sys.argv[2], to="modelopt", engine="stock-1.4")
verified = verify_checkpoint(sys.argv[1], sys.argv[2])
assert verified.good, verified.faults
assert sum(check.kind == "native" for check in verified.checks) == 14
"""
    run_in(changed, code, tmp_path / "in", tmp_path / "out")


def test_every_rank_is_handed_all_that_it_reads(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import open_checkpoint
from trtllm_ct.engine.parallel import Parallel, Rank
from trtllm_ct.layouts.torch_tensors import tensors_of
from trtllm_ct.pipeline.stream import stream_delivered
from trtllm_ct.plan.ranks.shard import plan_for_rank
from trtllm_ct.serve.completeness import prove_complete

checkpoint = open_checkpoint(sys.argv[1])
parallel = Parallel(tensor=2)
plan = checkpoint.plan("tensorrt_llm", engine="stock-1.4", parallel=parallel)
assert any(module.delivered_mode.startswith("W8A16_GROUP") for module in plan.modules)
for tensor in range(2):
    share = plan_for_rank(plan, checkpoint.model, Rank(parallel=parallel, tensor=tensor))
    weights = {{}}
    for _module, delivered in stream_delivered(share, checkpoint.catalog):
        weights |= tensors_of(delivered)
    prove_complete(share, weights)
"""
    run_in(changed, code, tmp_path)


@pytest.mark.reference
def test_the_reference_engine_computes_in_it(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import convert_checkpoint
from trtllm_ct.reference import generate_text

convert_checkpoint(sys.argv[1], sys.argv[2], to="modelopt", engine="stock-1.4")
source, converted = (generate_text(place, "Hello", max_tokens=4) for place in sys.argv[1:])
assert source.token_ids == converted.token_ids
"""
    run_in(changed, code, tmp_path / "in", tmp_path / "out")


def test_the_command_line_offers_the_release(changed: Path) -> None:
    code = "import sys; sys.argv = ['trtllm-ct', 'plan', '--help']; from trtllm_ct.cli.commands import main; main()"

    assert "stock-1.4" in run_in(changed, code)
