"""What an engine needs beside its directory: options of `trtllm-build` and of the run, each with its warning.

config.json has no key for these, and the defaults of the builder give a wrong engine, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.schemes import QuantAlgo
from trtllm_ct.plan.models.build_classes import Windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trtllm_ct.plan.engine_files.choice import Choice
    from trtllm_ct.plan.engine_files.rope import Rope
    from trtllm_ct.plan.models.build_classes import BuildClass
    from trtllm_ct.plan.models.sites import Model

__all__ = ["EngineOptions", "engine_options"]

_WITH_FP8_ATTENTION = frozenset({QuantAlgo.FP8, QuantAlgo.NVFP4})
_OUTPUT = ".self_attn.o_proj"
_NO_FP8_ATTENTION = ("--use_paged_context_fmha", "disable", "--use_fp8_context_fmha", "disable")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Arguments of `trtllm-build`, arguments of the program that runs the engine, and the warnings that say why."""

    build: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def engine_options(model: Model, row: BuildClass, rope: Rope, choice: Choice, kv_cache: str | None) -> EngineOptions:
    """Return the options of one model with the mode of `choice` and a KV cache of mode `kv_cache`."""
    options = [_length(rope), _fp8_attention(model, choice, kv_cache), _windows(model, row, rope.length)]
    return EngineOptions(
        build=tuple(argument for option in options for argument in option.build),
        run=tuple(argument for option in options for argument in option.run),
        warnings=tuple(warning for option in options for warning in option.warnings),
    )


def _length(rope: Rope) -> EngineOptions:
    """Return the option for an embedding whose table is shorter than the sequences that the builder takes."""
    build = ("--max_seq_len", str(rope.length)) if rope.limits else ()
    return EngineOptions(build=build, warnings=(rope.warning,) if rope.warning else ())


def _fp8_attention(model: Model, choice: Choice, kv_cache: str | None) -> EngineOptions:
    """Return the options for a plain output projection beside FP8 or NVFP4 with an FP8 cache.

    The builder then computes attention of prompts in FP8, and gives it the input scale of that projection. Without one,
    the plug-in takes its next input for the scale, and the projection gets FP8 numbers. Either option alone is turned
    on again by the other. Sources: TensorRT-LLM `builder.py: build` and `models/modeling_utils.py:
    set_fp8_context_fhma`, `layers/attention.py: _get_output_orig_quant_scale` and `gptAttentionPlugin.cpp`, texts of
    1.0 and later, read on 2026-11-29.
    """
    mode = choice.mode
    if mode is None or mode.algo not in _WITH_FP8_ATTENTION or kv_cache != QuantAlgo.FP8:
        return EngineOptions()
    held = sum(name.endswith(_OUTPUT) for name in choice.held)
    if held == model.layers:
        return EngineOptions()
    warning = (
        "trtllm-build computes attention of prompts in FP8 by default, which needs an input scale of every o_proj, and "
        f"{model.layers - held} of {model.layers} are plain: build with {' '.join(_NO_FP8_ATTENTION)}"
    )
    return EngineOptions(build=_NO_FP8_ATTENTION, warnings=(warning,))


def _windows(model: Model, row: BuildClass, length: int) -> EngineOptions:
    """Return the option for sliding windows: one for all layers, or one for each; a full one has the model's length."""
    window = _window(model, row)
    if not 0 < window < length:
        return EngineOptions()
    sliding = _sliding_layers(model, row)
    if not any(sliding):
        return EngineOptions()
    sizes = [str(window if slides else length) for slides in sliding]
    argument = ("--max_attention_window_size", *([sizes[0]] if all(sliding) else sizes))
    of_layers = "" if all(sliding) else f" of {sum(sliding)} of {model.layers} layers"
    return EngineOptions(
        run=argument,
        warnings=(
            f"sliding_window {window}{of_layers} is no part of an engine: give {' '.join(argument)} when you run it",
        ),
    )


def _window(model: Model, row: BuildClass) -> int:
    """Return the window of the layers that have one, 0 for none. A window of null is none, and is not left out."""
    window = model.text.get("sliding_window", row.defaults.get("sliding_window"))
    if row.windows is Windows.NONE or not isinstance(window, int) or isinstance(window, bool):
        return 0
    used = _stated(model, row, "use_sliding_window") if row.windows is Windows.BY_LAYER else True
    return window if used else 0


def _sliding_layers(model: Model, row: BuildClass) -> Sequence[bool]:
    """Return which layers have the window. A list of kinds of another length says nothing."""
    kinds = model.text.get("layer_types")
    if row.windows is Windows.ALL:
        return [True] * model.layers
    if isinstance(kinds, list) and len(kinds) == model.layers:
        return [kind == "sliding_attention" for kind in kinds]
    first = _stated(model, row, "max_window_layers")
    return [isinstance(first, int) and layer >= first for layer in range(model.layers)]


def _stated(model: Model, row: BuildClass, key: str) -> Any:
    """Return the value of a key, or the default of the class if it is missing or null."""
    value = model.text.get(key)
    return row.defaults.get(key) if value is None else value
