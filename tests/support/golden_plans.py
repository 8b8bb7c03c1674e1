"""What is planned for checkpoints of every class, as digests: sites, modes, deliveries, names and slices.

A table of digests is committed, so that a change of a plan is a decision; `described` is what a digest is made of.
Texts such as reasons and warnings are left out: they may get better without a plan becoming another one.

    PYTHONPATH=tests/support python tests/support/golden_plans.py tiny > tests/plan/models/golden_plans.json
    PYTHONPATH=tests/support python tests/support/golden_plans.py built > tests/plan/models/golden_built_plans.json
    PYTHONPATH=tests/support python tests/support/golden_plans.py FOLDER > tests/plan/models/golden_real_plans.json
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders import rewrite, tiny_config, write_checkpoint
from class_models import CLASSES, write_class
from decoder_models import DECODERS, write_decoder
from mistral_form import write_native
from multimodal import write_multimodal
from tiny_models import FAMILIES

from trtllm_ct import open_checkpoint
from trtllm_ct.base.errors import FaultCollector, TrtllmCtError
from trtllm_ct.engine.parallel import Cut, Parallel, Rank
from trtllm_ct.plan.gathering import gather_modules
from trtllm_ct.plan.ranks.shard import plan_for_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["BUILT", "GOLDEN", "GOLDEN_BUILT", "GOLDEN_REAL", "TINY", "described", "digests", "real_checkpoints"]

_FOLDER = Path(__file__).parents[1] / "plan" / "models"
GOLDEN = _FOLDER / "golden_plans.json"
GOLDEN_BUILT = _FOLDER / "golden_built_plans.json"
GOLDEN_REAL = _FOLDER / "golden_real_plans.json"

_TARGETS = (
    ("modelopt", "stock-1.0"),
    ("modelopt", "stock-1.3"),
    ("tensorrt_llm", "stock-1.3"),
    ("dense", "stock-1.3"),
    ("engine", "stock-1.0"),
)
_SIZES = (1, 2, 4)
# Facts about a site that are the same however the tables are written.
_OF_SITE = (
    *("module", "class_name", "shape", "mode_group", "fused", "shares", "plain", "expert", "head", "locals"),
    *("aliases", "cut", "heads", "parts", "attention", "class_cuts", "class_joins", "early"),
)

Write = Callable[[Path], object]


def _family(name: str, scheme: str, **options: Any) -> Write:
    config = tiny_config(name, hidden=128, intermediate=256, **(FAMILIES[name] | options))
    return lambda directory: write_checkpoint(directory, config=config, scheme=scheme, kv=name == "LlamaForCausalLM")


def _wrapped(body: str, architecture: str, kinds: tuple[str, str], text: str, scheme: str = "int4-g32") -> Write:
    config = tiny_config(text, hidden=128, intermediate=256)
    return partial(write_multimodal, body=body, architecture=architecture, kinds=kinds, text=config, scheme=scheme)


def _without(directory: Path, lost: str, write: Write) -> None:
    """A checkpoint that has lost a tensor."""
    write(directory)
    rewrite(directory, lambda stored: stored.pop(lost))


_OUTER, _INNER = "model.language_model.", "language_model.model."
TINY: dict[str, Write] = {
    **{f"{name} int4": _family(name, "int4-g32") for name in FAMILIES},
    **{f"{name} fp8": _family(name, "fp8-channel-token") for name in FAMILIES},
    **{f"{name} fp8-static": _family(name, "fp8-tensor-static", tied=True) for name in FAMILIES},
    "DeepseekV2ForCausalLM fp8-block": _family("DeepseekV2ForCausalLM", "fp8-block"),
    "DeepseekV2ForCausalLM without low-rank queries": _family("DeepseekV2ForCausalLM", "int4-g32", q_lora_rank=None),
    "LlamaForCausalLM with biases": _family("LlamaForCausalLM", "int4-g32", attention_bias=True, mlp_bias=True),
    "Qwen3MoeForCausalLM with a dense layer": _family("Qwen3MoeForCausalLM", "nvfp4", mlp_only_layers=[1]),
    "LlavaNextForConditionalGeneration": _wrapped(
        _INNER, "LlavaNextForConditionalGeneration", ("llava_next", "llama"), "LlamaForCausalLM"
    ),
    "Gemma3ForConditionalGeneration": _wrapped(
        _OUTER, "Gemma3ForConditionalGeneration", ("gemma3", "gemma3_text"), "Gemma3ForCausalLM"
    ),
    "Mistral3ForConditionalGeneration": _wrapped(
        _OUTER, "Mistral3ForConditionalGeneration", ("mistral3", "mistral"), "MistralForCausalLM"
    ),
    "Qwen3VLMoeForConditionalGeneration": _wrapped(
        _OUTER, "Qwen3VLMoeForConditionalGeneration", ("qwen3_vl_moe", "qwen3_vl_moe_text"), "Qwen3MoeForCausalLM"
    ),
    "Mistral's own form": partial(write_native, rename={"weight_scale": "qscale_weight"}),
    "LlamaForCausalLM without a norm": partial(
        _without, lost="model.layers.1.input_layernorm.weight", write=_family("LlamaForCausalLM", "int4-g32")
    ),
    "Qwen3MoeForCausalLM without an expert": partial(
        _without, lost="model.layers.1.mlp.experts.3.up_proj.weight", write=_family("Qwen3MoeForCausalLM", "dense")
    ),
    **{name: partial(write_class, name=name, scheme="fp8-channel-token") for name in CLASSES},
}
"""Tiny checkpoints by name, most of them whole, with the functions that write them."""

BUILT: dict[str, Write] = {name: partial(write_decoder, name=name, scheme="fp8-channel-token") for name in DECODERS}
"""Tiny checkpoints of models that transformers builds."""


def real_checkpoints(folder: Path) -> dict[str, Path]:
    """Those that somebody else wrote, in `checkpoints/` of the shared folder, by name."""
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}


def digests(directory: Path) -> dict[str, str]:
    """One digest for each target and release: of the plans at all parallel sizes."""
    return {
        f"{target} {engine}": _digest([described(directory, target, engine, size) for size in _SIZES])
        for target, engine in _TARGETS
    }


def described(directory: Path, target: str, engine: str, size: int) -> dict[str, Any]:
    """The facts of one plan, or where the faults are that it has instead."""
    try:
        checkpoint = open_checkpoint(directory)
        plan = checkpoint.plan(target, engine=engine, parallel=Parallel(tensor=size))
    except TrtllmCtError as error:
        return {"faults": sorted({fault.where for fault in error.faults})}
    return {
        "sites": list(_sites(checkpoint)),
        "modules": [_module(module) for module in plan.modules],
        "shares": [list(_shares(plan, checkpoint, rank)) for rank in range(size)] if target == "tensorrt_llm" else [],
        "quantization": plan.quant_config.to_dict(),
        "problems": [fault.where for fault in plan.problems],
        "warnings": len(plan.warnings),
        "stacks": {name: repr(part) for name, part in plan.stacks.items()},
        "tied": plan.tied,
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _sites(checkpoint: Checkpoint) -> Iterator[list[str]]:
    model = checkpoint.model
    stored = gather_modules(checkpoint.catalog, model, FaultCollector(), checkpoint.probe.shapes, split_stacks=True)
    model = model.in_checkpoint(stored)
    for site in model.sites(model.place(stored)):
        # Of modules that ranks don't divide, it means nothing whether the number of ranks varies.
        varies = site.ranks_vary and site.cut is not Cut.NONE
        yield [*(str(getattr(site, name)) for name in _OF_SITE), str(varies)]


def _module(module: ModulePlan) -> dict[str, Any]:
    return {
        "name": module.name,
        "class": module.class_name,
        "mode": module.delivered_mode,
        "fused": module.fused_linear,
        "experts": module.experts,
        "deliveries": [delivery.to_dict() for delivery in module.deliveries],
        "ignored": sorted(module.ignored),
        "pieces": [[delivery.to_dict() for delivery in piece.deliveries] for piece in module.pieces],
    }


def _shares(plan: Plan, checkpoint: Checkpoint, rank: int) -> Iterator[list[Any]]:
    share = plan_for_rank(plan, checkpoint.model, Rank(parallel=plan.parallel, tensor=rank))
    for module in share.modules:
        yield [module.name, *((module.share.begin, module.share.end) if module.share else ())]


def _table(checkpoints: dict[str, Write]) -> dict[str, dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        table = {}
        for number, (name, write) in enumerate(checkpoints.items()):
            directory = Path(folder) / str(number)
            write(directory)
            table[name] = digests(directory)
    return table


def _main(where: str) -> None:
    if where in {"tiny", "built"}:
        table = _table(TINY if where == "tiny" else BUILT)
    else:
        table = {name: digests(path) for name, path in real_checkpoints(Path(where)).items()}
    json.dump(table, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    _main(sys.argv[1])
