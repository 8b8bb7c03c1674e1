"""docs/adding-an-architecture.md, followed to the letter: a row alone makes an architecture known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from page_changes import ROOT, apply_page, copy_of_package, listed_files, run_in

if TYPE_CHECKING:
    from pathlib import Path

PAGE = ROOT / "docs" / "adding-an-architecture.md"

# A checkpoint of the page's architecture, from one of Qwen3 with biases, whose MLP is called otherwise.
WRITE = """
import sys
from pathlib import Path
import torch
from builders import rewrite, rewrite_config, tiny_config, write_checkpoint

LEAVES = {"mlp.gate_proj": "feed_forward.gate", "mlp.up_proj": "feed_forward.up", "mlp.down_proj": "feed_forward.down"}

def renamed(stored):
    for name in list(stored):
        for leaf, other in LEAVES.items():
            if f".{leaf}." in name:
                stored[name.replace(leaf, other)] = stored.pop(name)

config = tiny_config("Qwen3ForCausalLM", attention_bias=True)
built = write_checkpoint(Path(sys.argv[1]), config=config, scheme="int4-g64")
rewrite(Path(sys.argv[1]), renamed)
rewrite_config(Path(sys.argv[1]), lambda config: config.update(architectures=["ToyForCausalLM"]))
"""

# A checkpoint of the page's class with a row: Qwen3 with a second part of each layer, and a router.
WRITE_BOX = """
import sys
from pathlib import Path
import torch
from builders import rewrite, rewrite_config, tiny_config, write_checkpoint

def with_mixers(stored):
    for name in list(stored):
        if ".self_attn.o_proj." in name:
            for leaf in ("in_proj", "out_proj"):
                stored[name.replace("self_attn.o_proj", f"mixer.{leaf}")] = stored[name].clone()
    for layer in range(2):
        stored[f"model.layers.{layer}.mlp.router.weight"] = torch.randn(4, 64).bfloat16()

write_checkpoint(Path(sys.argv[1]), config=tiny_config("Qwen3ForCausalLM"), scheme="int4-g64")
rewrite(Path(sys.argv[1]), with_mixers)
rewrite_config(Path(sys.argv[1]), lambda config: config.update(architectures=["BoxForCausalLM"], model_type="box"))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = copy_of_package(tmp_path_factory.mktemp("architecture"))
    apply_page(PAGE, root)
    return root


def test_the_page_lists_the_files_that_it_changes(tmp_path: Path) -> None:
    assert apply_page(PAGE, copy_of_package(tmp_path)) == listed_files(PAGE)


@pytest.mark.parametrize("target", ["modelopt", "dense"])
def test_a_checkpoint_is_converted_and_verified(changed: Path, tmp_path: Path, target: str) -> None:
    code = f"""{WRITE}
from trtllm_ct import convert_checkpoint, inspect_checkpoint, verify_checkpoint

source, out, target = sys.argv[1:]
inspection = inspect_checkpoint(source, target, engine="stock-1.3")
assert not inspection.problems, inspection.problems
assert inspection.plan.architecture == "ToyForCausalLM"
convert_checkpoint(source, out, to=target)
verified = verify_checkpoint(source, out)
assert verified.good, verified.faults
assert "model.layers.1.feed_forward.down.weight" in {{check.name for check in verified.checks}}
"""
    run_in(changed, code, tmp_path / "in", tmp_path / "out", target)


def test_the_modules_that_a_row_lists_are_fused_and_cut(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import open_checkpoint
from trtllm_ct.engine.parallel import Parallel, Rank
from trtllm_ct.plan.ranks.shard import plan_for_rank

checkpoint = open_checkpoint(sys.argv[1])
parallel = Parallel(tensor=2)
plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
layer = "model.layers.0"
assert plan.module(f"{{layer}}.feed_forward.up").fused_linear == f"{{layer}}.feed_forward.gate_up"
assert plan.module(f"{{layer}}.self_attn.q_proj").fused_linear == f"{{layer}}.self_attn.qkv_proj"
share = plan_for_rank(plan, checkpoint.model, Rank(parallel=parallel, tensor=1))
assert share.module(f"{{layer}}.feed_forward.up").share.begin == 64
assert share.module(f"{{layer}}.feed_forward.down").share is None
"""
    run_in(changed, code, tmp_path)


@pytest.mark.parametrize("target", ["modelopt", "dense"])
def test_a_checkpoint_of_a_class_with_a_row_is_converted_and_verified(
    changed: Path, tmp_path: Path, target: str
) -> None:
    code = f"""{WRITE_BOX}
from trtllm_ct import convert_checkpoint, inspect_checkpoint, verify_checkpoint

source, out, target = sys.argv[1:]
inspection = inspect_checkpoint(source, target, engine="stock-1.3")
assert not inspection.problems, inspection.problems
if target == "modelopt":
    layer, quantized = "model.layers.0", inspection.plan.quant_config
    assert inspection.plan.module(f"{{layer}}.mixer.in_proj").layer is None
    assert inspection.plan.module(f"{{layer}}.mixer.out_proj").layer is not None
    assert {{f"{{layer}}.mixer.in_proj", f"{{layer}}.mlp.router"}} <= {{*quantized.exclude_modules}}
convert_checkpoint(source, out, to=target)
verified = verify_checkpoint(source, out)
assert verified.good, verified.faults
"""
    run_in(changed, code, tmp_path / "in", tmp_path / "out", target)


def test_the_row_fuses_and_cuts_modules_and_gives_them_names(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE_BOX}
from trtllm_ct import open_checkpoint
from trtllm_ct.engine.parallel import Parallel, Rank
from trtllm_ct.plan.engine_names import EngineNames
from trtllm_ct.engine.target import target_named
from trtllm_ct.plan.ranks.shard import plan_for_rank

checkpoint = open_checkpoint(sys.argv[1])
parallel = Parallel(tensor=2)
plan = checkpoint.plan("tensorrt_llm", parallel=parallel)
layer = "model.layers.0"
assert plan.module(f"{{layer}}.mlp.up_proj").fused_linear == f"{{layer}}.mlp.gate_up_proj"
share = plan_for_rank(plan, checkpoint.model, Rank(parallel=parallel, tensor=1))
assert share.module(f"{{layer}}.mlp.up_proj").share.begin == 64
assert share.module(f"{{layer}}.mixer.in_proj").share.begin == 32
assert share.module(f"{{layer}}.mixer.out_proj").share is None
names = EngineNames.of(checkpoint.model, ("model.", "lm_head"), target_named("modelopt", "stock-1.3"))
assert names.of_module(f"{{layer}}.mlp.up_proj") == (f"{{layer}}.mlp.up_proj", f"{{layer}}.feed_forward.up_proj")
"""
    run_in(changed, code, tmp_path / "in")


def test_a_checkpoint_that_lacks_one_of_its_modules_is_refused(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import inspect_checkpoint

name = "model.layers.0.self_attn.q_norm.weight"
rewrite(Path(sys.argv[1]), lambda stored: stored.pop(name))
assert [fault.where for fault in inspect_checkpoint(sys.argv[1]).problems] == [name]
"""
    run_in(changed, code, tmp_path)


def test_it_is_known_as_the_text_model_of_a_larger_one(changed: Path, tmp_path: Path) -> None:
    code = f"""{WRITE}
from trtllm_ct import inspect_checkpoint

def nested(config):
    keep = ("quantization_config", "dtype", "torch_dtype")
    text = {{key: config.pop(key) for key in list(config) if key not in keep}} | {{"model_type": "toy"}}
    config |= {{"architectures": ["BoxForConditionalGeneration"], "text_config": text}}

def moved(stored):
    for name in list(stored):
        stored[f"language_model.{{name}}"] = stored.pop(name)

rewrite(Path(sys.argv[1]), moved)
rewrite_config(Path(sys.argv[1]), nested)
inspection = inspect_checkpoint(sys.argv[1], "dense")
assert not inspection.problems, inspection.problems
"""
    run_in(changed, code, tmp_path)
