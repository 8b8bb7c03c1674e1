"""Tiny models of any class of transformers, quantized by the library without data, and what becomes of them.

The steps are those of llm-compressor: stacked experts become Linears one by one, every Linear but the head gets the
scheme, scales come from minimum and maximum, and the model is saved as transformers saves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from fused_experts import fuse_experts
from installed_library import attach_schemes
from library_builder import _calibrate
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trtllm_ct.base.errors import TrtllmCtError
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.pipeline.inspection import inspect_checkpoint
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "moe_router", "wg"})
SCHEMES = {"fp8-dynamic": ("FP8_DYNAMIC", 1), "w4a16-g32": ("W4A16", 32)}
"""The library's preset and the number of columns that it needs a multiple of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A model on disk; `dense` are the tensors that its class has after its codes were dequantized by the library."""

    directory: Path
    model_class: type
    dense: dict[str, Tensor]
    quantized: int


class _Expert(nn.Module):
    """The Linears of one expert, by the names that llm-compressor gives them."""


@torch.no_grad()
def quantize(model: Any, directory: Path, scheme: str, *, stacked: bool = False) -> Quantized:
    """Quantize a model in place and save it; `stacked` experts are saved as tensors of all of them.

    Only experts [E, out, in] of gate, up and down can be saved stacked.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig

    preset, columns = SCHEMES[scheme]
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    owners = _one_by_one(model)
    heads = {id(model.get_output_embeddings())}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = [name for name, linear in linears.items() if id(linear) in heads or linear.in_features % columns]
    left += [name for name in linears if name.rpartition(".")[2] in _ROUTERS]
    config = QuantizationConfig(config_groups={preset: ["Linear"]}, ignore=left)
    for group in config.config_groups.values():
        if columns > 1:
            group.weights.group_size = columns
    attach_schemes(model, config)
    _calibrate(model, torch.Generator().manual_seed(0))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    compressor.decompress_model(model)
    state = model.state_dict()
    dense |= {name: tensor for name, tensor in state.items() if name in dense}
    for owner, experts in owners.items():
        dense |= _together(state, owner, experts, dense)
    if stacked:
        tensors = load_file(directory / "model.safetensors")
        fuse_experts(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return Quantized(
        directory=directory, model_class=type(model), dense=dense, quantized=len(linears.keys() - set(left))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stacked:
    """How a class holds experts: the names of its tensors, and the order of their axes and rows."""

    names: tuple[str, ...]
    count: int
    inputs_first: bool
    interleaved: bool


def has_stacks(model: nn.Module) -> bool:
    """Whether a model holds gate, up and down of its experts in two tensors."""
    return any(_is_stack(module, "gate_up_proj") for module in model.modules())


def _one_by_one(model: nn.Module) -> dict[str, _Stacked]:
    """Replace stacked experts by Linears; return how the class held them."""
    owners = {}
    for name, module in list(model.named_modules()):
        stacks = [local for local in ("gate_up_proj", "up_proj", "down_proj") if _is_stack(module, local)]
        if len(stacks) != 2 or _is_stack(module, "gate_proj"):
            continue
        kind = type(module).__name__
        experts = _Stacked(
            names=tuple(stacks),
            count=min(len(getattr(module, local)) for local in stacks),
            inputs_first=bool(getattr(module, "is_transposed", kind.startswith("Llama4"))),
            interleaved=kind.startswith("GptOss"),
        )
        owners[name] = experts
        single = nn.ModuleList(_expert(module, experts, i) for i in range(experts.count))
        # Some classes have a norm beside the stacks.
        for local, child in module.named_children():
            if any(True for _ in child.parameters()):
                single.add_module(local, child)
        model.set_submodule(name, single)
    return owners


def _is_stack(module: nn.Module, local: str) -> bool:
    parameter = getattr(module, local, None)
    return isinstance(parameter, nn.Parameter) and parameter.dim() == 3


def _expert(module: nn.Module, experts: _Stacked, number: int) -> nn.Module:
    expert = _Expert()
    for local in experts.names:
        weight = getattr(module, local)[number]
        weight = weight.T if experts.inputs_first else weight
        bias = getattr(module, f"{local}_bias", None)
        for projection, rows in _rows(experts, local, len(weight)):
            linear = nn.Linear(weight.shape[1], len(weight[rows]), bias=bias is not None, dtype=weight.dtype)
            linear.weight.copy_(weight[rows])
            if bias is not None:
                linear.bias.copy_(bias[number][rows])
            setattr(expert, projection, linear)
    return expert


def _rows(experts: _Stacked, local: str, count: int) -> Iterator[tuple[str, slice]]:
    """The projections in a stacked tensor and their rows."""
    if local != "gate_up_proj":
        yield local, slice(None)
    elif experts.interleaved:
        yield "gate_proj", slice(0, None, 2)
        yield "up_proj", slice(1, None, 2)
    else:
        yield "gate_proj", slice(0, count // 2)
        yield "up_proj", slice(count // 2, None)


def _together(state: dict[str, Tensor], owner: str, experts: _Stacked, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stacked tensors of the Linears of all experts, as the class holds them."""
    stacks = {}
    for local in experts.names:
        for name, parameter in ((local, "weight"), (f"{local}_bias", "bias")):
            if f"{owner}.{name}" not in like:
                continue
            stack = torch.empty_like(like[f"{owner}.{name}"])
            rows_first = stack.mT if experts.inputs_first and stack.dim() == 3 else stack
            for projection, rows in _rows(experts, local, rows_first.shape[1]):
                for number in range(experts.count):
                    rows_first[number][rows] = state[f"{owner}.{number}.{projection}.{parameter}"]
            stacks[f"{owner}.{name}"] = stack
    return stacks


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a checkpoint: `exact`, `copied` if nothing is quantized, or the stage that failed; and why."""

    result: str
    why: str = ""


def taken_through(source: Quantized, out: Path) -> Outcome:
    """Inspect, convert to plain weights, verify and load in transformers; a traceback is a failure like any other."""
    try:
        problems = inspect_checkpoint(source.directory, "dense").problems
        if problems:
            return Outcome(result="inspect", why=str(problems[0]))
        convert_checkpoint(source.directory, out, to="dense")
        report = verify_checkpoint(source.directory, out)
    except TrtllmCtError as error:
        return Outcome(result="refused", why=str(error))
    if not report.good:
        return Outcome(result="verify", why=str(report.faults[0]))
    return _loaded(source, out)


def _loaded(source: Quantized, out: Path) -> Outcome:
    """Compare the model that transformers loads with the dequantized one."""
    model, told = source.model_class.from_pretrained(out, output_loading_info=True, dtype=torch.bfloat16)
    lost = {kind: sorted(told[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if told[kind]}
    if lost:
        return Outcome(result="loading", why=str(lost))
    state = model.state_dict()
    wrong = [name for name, tensor in source.dense.items() if not _same(state.get(name), tensor)]
    if wrong:
        return Outcome(result="values", why=str(wrong))
    return Outcome(result="exact") if source.quantized else Outcome(result="copied", why="the class has no Linear")


def _same(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors have the same values; a class may keep some of them in float32."""
    return one is not None and torch.equal(one.double(), other.double())
