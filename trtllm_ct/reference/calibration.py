"""Measure the static scales of inputs: run the reference engine over a text, and keep the largest magnitudes.

Kernels with static FP8 or FP4 inputs read one scale for each Linear, and for each projection of an expert. ModelOpt's
calibration by the largest magnitude does the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trtllm_ct.base.arguments import path_of
from trtllm_ct.base.errors import FaultCollector, PayloadError, UsageError
from trtllm_ct.base.json_form import json_object
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.engine.calibration import LARGEST_E4M3, is_scale
from trtllm_ct.reference.architecture import require_transformers
from trtllm_ct.reference.directory import read_directory
from trtllm_ct.reference.engine import build_model
from trtllm_ct.reference.generate import require_known_tokens, useful_threads
from trtllm_ct.reference.linear import ReferenceLinear
from trtllm_ct.reference.names import NameMap
from trtllm_ct.reference.perplexity import text_windows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["MeasuredScales", "measure_scales"]

_EXPERT = re.compile(r"(?P<experts>.+)\.\d+\.(?P<projection>[^.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredScales:
    """The scale of the input of each Linear: the largest magnitude of the input on a text, over 448.

    `unreached` are the experts' modules that no token reached; they have the largest scale of the same projection in
    their layer.
    """

    model: str
    tokens: int
    window: int
    seconds: float
    unreached: tuple[str, ...]
    scales: Mapping[str, float] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the single scales."""
        return json_object(
            {
                "model": self.model,
                "modules": len(self.scales),
                "tokens": self.tokens,
                "window": self.window,
                "seconds": self.seconds,
                "unreached": self.unreached,
            }
        )


@missing_packages_as_errors()
def measure_scales(
    directory: str | Path,
    text: str,
    *,
    window: int = 1024,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> MeasuredScales:
    """Run the model of a checkpoint over a text, and return the scales of the inputs of its Linears.

    The text is read as by `text_perplexity`. Activations are not quantized meanwhile. Nothing is downloaded.
    Raises what `load_model` and `text_perplexity` raise, `UsageError` if the text reaches no expert of a layer, and
    `PayloadError` for inputs that are not finite, or so large or small that their scale would be refused.
    """
    require_transformers()
    source = read_directory(path_of("directory", directory), dtype=dtype)
    windows = text_windows(str(directory), text, window=window, max_tokens=max_tokens)
    seen: dict[str, None] = {}
    model: Any = build_model(
        source.config,
        source.quant_config,
        _noted(source.tensors, seen),
        dtype=dtype,
        quantize_activations=False,
        name=str(directory),
    )
    require_known_tokens(model, chain.from_iterable(windows))
    # Releases of transformers have other names for the same parts, so the model says which it has.
    paths = [path for path, _ in model.named_modules()]
    names = NameMap.of_checkpoint(source.config, model_type=model.config.model_type, model=paths)
    modules = _linears(model, names, seen)
    started = perf_counter()
    largest = _largest_inputs(model, modules, windows)
    scales, unreached = _scales(largest)
    return MeasuredScales(
        model=str(directory),
        tokens=sum(map(len, windows)),
        window=len(windows[0]),
        seconds=perf_counter() - started,
        unreached=unreached,
        scales=scales,
    )


def _noted(tensors: Iterable[tuple[str, Tensor]], seen: dict[str, None]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors, and note the names of their modules."""
    for name, tensor in tensors:
        seen[name.rpartition(".")[0]] = None
        yield name, tensor


def _linears(model: nn.Module, names: NameMap, seen: Iterable[str]) -> dict[str, nn.Module]:
    """Return the Linears of a model that have tensors in the checkpoint, by their names there.

    Some are plain here although they are quantized in the checkpoint: kernels of experts hold fewer schemes.
    """
    stored = {names.path(name): name for name in seen}
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        # The class of some experts has a child of its own for the list of them.
        name = stored.get(path) or stored.get(path.replace(".experts.experts.", ".experts."))
        if name is not None and isinstance(module, ReferenceLinear | nn.Linear):
            found[name] = module
    return found


@torch.inference_mode()
def _largest_inputs(model: Any, modules: Mapping[str, nn.Module], windows: Iterable[list[int]]) -> dict[str, float]:
    """Return the largest magnitude of each module's input, 0 for a module that no token reached."""
    largest = dict.fromkeys(modules, 0.0)

    def watch(name: str, module: nn.Module) -> Any:
        def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if arguments[0].numel():
                # Of a number and NaN, `max` may keep either.
                peak = float(arguments[0].abs().amax())
                largest[name] = peak if peak != peak else max(peak, largest[name])  # noqa: PLR0124

        return module.register_forward_pre_hook(note)

    handles = [watch(name, module) for name, module in modules.items()]
    try:
        with useful_threads(model):
            for tokens in windows:
                model(input_ids=torch.tensor([tokens]))
    finally:
        for handle in handles:
            handle.remove()
    return largest


def _scales(largest: Mapping[str, float]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the scale of each module, and the experts' modules that no token reached."""
    _refuse_without_scale(largest)
    of_layer: dict[tuple[str, ...], float] = {}
    for name, peak in largest.items():
        layer = _layer(name)
        of_layer[layer] = max(peak, of_layer.get(layer, 0.0))
    faults = FaultCollector()
    for name in largest:
        if not of_layer[_layer(name)]:
            faults.add(
                where=f"input of {name}",
                expected="values other than zero, or those of another expert of the layer",
                found="none on this text",
                remedy="Give more text, such as --max-tokens 4096.",
            )
    faults.raise_if_any(UsageError)
    unreached = tuple(name for name, peak in largest.items() if not peak)
    return {name: (peak or of_layer[_layer(name)]) / LARGEST_E4M3 for name, peak in largest.items()}, unreached


def _layer(name: str) -> tuple[str, ...]:
    """Return what the same projection of all experts of a layer has in common; the name of any other module."""
    match = _EXPERT.fullmatch(name)
    return (match["experts"], match["projection"]) if match and match["experts"].endswith("experts") else (name,)


def _refuse_without_scale(largest: Mapping[str, float]) -> None:
    """Raise `PayloadError` with each module whose input has a value that is not finite, or beyond all scales.

    A file with such a scale would be refused where it is read.
    """
    faults = FaultCollector()
    for name, peak in largest.items():
        if peak and not is_scale(peak / LARGEST_E4M3):
            faults.add(
                where=f"input of {name}",
                expected="finite numbers, of which the largest is from 448 x 2^-100 to 448 x 2^100",
                found=f"{peak:g}",
                remedy="Check the checkpoint with `trtllm-ct verify`; no scale holds such inputs.",
            )
    faults.raise_if_any(PayloadError)
