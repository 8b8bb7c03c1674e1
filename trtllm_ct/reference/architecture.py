"""Build a model of transformers as an empty shell: the architecture without weights.

transformers is an optional dependency. It is imported inside functions only, and only in this folder.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trtllm_ct.base.errors import ConfigError, Fault, MissingDependencyError
from trtllm_ct.base.json_values import CONFIGURATION_VALUES, require_few_values
from trtllm_ct.base.packages import PACKAGES, missing_packages_as_errors
from trtllm_ct.base.regular_files import CONFIGURATION_BYTES, read_bounded
from trtllm_ct.reference.rope import older_rope_keys, reads_rope_parameters

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "build_shell",
    "in_one_line",
    "kept_in_float32",
    "quiet_transformers",
    "read_generation_config",
    "require_transformers",
    "tied_parameters",
]

_QUANTIZATION_BLOCKS = frozenset({"quantization_config", "compression_config"})
_PASSED_SEPARATELY = frozenset({"model_type", "dtype", "torch_dtype"})

# Model types for which transformers has no causal language model: the model type whose code computes the same, and the
# config fields to set for it. The text models of Qwen-VL differ only in their rotary embeddings, and there only for
# images: a text token has the same position on all three axes.
_EQUIVALENT_MODEL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "kimi_k2": ("deepseek_v3", {}),
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
}


def require_transformers() -> None:
    """Raise `MissingDependencyError` when transformers is not installed, or is too old."""
    package = PACKAGES["transformers"]
    if package.outdated:
        raise MissingDependencyError(package.fault(found=f"release {package.outdated}, older than {package.oldest}"))
    try:
        with missing_packages_as_errors():
            import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(package.fault(found=in_one_line(error))) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers log errors only, and restore its log level afterwards."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def build_shell(config: Mapping[str, Any], *, dtype: torch.dtype, attention: str | None, name: str) -> nn.Module:
    """Build the causal language model of `config` (a parsed config.json) with every parameter on the meta device.

    For a multimodal model, this is the language model of its `text_config`. Buffers, such as the frequencies of rotary
    embeddings, are real tensors. Quantization blocks of `config` are ignored. `attention` names a registered attention
    function; with None, transformers chooses. `name` becomes the model's `name_or_path`.
    Raises `ConfigError` when transformers can't build a causal language model from `config`.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet_transformers(), _parameters_on_meta():
            whole = _typed_config(_without_quantization(config))
            typed = _language_config(config, whole)
            typed.name_or_path = name
            options = {_dtype_argument(): dtype, "attn_implementation": attention}
            return _built(whole, typed, options)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            Fault(
                where=f"{name}: config.json",
                expected="a causal language model that transformers knows",
                found=f"model_type {config.get('model_type')!r}, and {in_one_line(error)}",
                remedy="Check config.json, or install a transformers that knows the architecture.",
            )
        ) from error


def _dtype_argument() -> str:
    """The argument of transformers' models that names the dtype: `torch_dtype` before 4.56.

    Source: transformers 4.55 and 4.57 `modeling_utils.py`, `PreTrainedModel._from_config`.
    """
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _built(whole: Any, text: Any, options: Mapping[str, Any]) -> nn.Module:
    """The language model with the config `text`, in a model with the config `whole`.

    The table of transformers names the class of some language models for the config of the whole model only (Mllama).
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CLASSES
    from transformers import AutoModelForCausalLM

    around = CLASSES[type(whole)] if type(whole) in CLASSES and type(text) not in CLASSES else None
    if around is None or not isinstance(text, around.config_class):
        model: nn.Module = AutoModelForCausalLM.from_config(text, **options)
    else:
        model = around._from_config(text, **options)  # noqa: SLF001 (what from_config calls)
    return model


def _language_config(config: Mapping[str, Any], typed: Any) -> Any:
    """The typed config of the language model in the model with the config `typed`.

    For a multimodal model, `tie_word_embeddings` is read from the outer config first, then from its `text_config`.
    """
    text = typed.get_text_config(decoder=True)
    if text is typed:
        return typed
    blocks = (config, config.get("text_config") or {})
    flags = (block["tie_word_embeddings"] for block in blocks if "tie_word_embeddings" in block)
    tied = next(flags, typed.tie_word_embeddings)
    if text.model_type in _EQUIVALENT_MODEL:
        text = _typed_config(text.to_dict())
    text.tie_word_embeddings = tied
    return text


def _typed_config(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    model_type, overrides = _EQUIVALENT_MODEL.get(str(config.get("model_type")), (config.get("model_type"), {}))
    fields = {key: value for key, value in config.items() if key not in _PASSED_SEPARATELY}
    if not reads_rope_parameters():
        fields = older_rope_keys(fields)
    return AutoConfig.for_model(model_type, **{**fields, **overrides})


def read_generation_config(model: nn.Module, directory: Path) -> None:
    """Set the model's generation config, which names the end tokens, from `generation_config.json` if it exists.

    Raises `ConfigError` when transformers can't read the file.
    """
    from transformers import GenerationConfig

    path = directory / "generation_config.json"
    if not path.is_file():
        return
    try:
        require_few_values(read_bounded(path, CONFIGURATION_BYTES), CONFIGURATION_VALUES)
        with quiet_transformers():
            model.generation_config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            Fault(
                where=str(path),
                expected="a generation config that transformers can read",
                found=in_one_line(error),
                remedy="Repair the file or delete it; config.json then says which token ends a text.",
            )
        ) from error


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Map the name of each tied parameter, such as `lm_head.weight`, to the name of the parameter it is tied to.

    Two parameters are tied when they are the same object. The first of them in the model is the one it is tied to.
    """
    first_name: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    owners = {name: first_name.setdefault(id(parameter), name) for name, parameter in named}
    return {name: owner for name, owner in owners.items() if name != owner}


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str]:
    """A pattern that finds the names of tensors that transformers keeps in float32 although it computes in `dtype`.

    The biases of routers are an example: their differences are smaller than the steps of bfloat16.
    """
    kept: set[str] = set()
    if dtype in {torch.bfloat16, torch.float16}:
        kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(name.replace("*", ".*") for name in sorted(kept)) or "(?!)")


def in_one_line(error: Exception) -> str:
    """The type and text of an error on one line of at most 200 characters.

    Errors of transformers can be long: some list the names of all architectures.
    """
    return textwrap.shorten(f"{type(error).__name__}: {error}", width=200)


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` without quantization blocks, at any depth: multimodal models keep one in `text_config`.

    transformers 5 writes infinite numbers as `{"__float__": "Infinity"}`, alone or in lists, which become numbers.
    """
    return {key: _decoded(value) for key, value in config.items() if key not in _QUANTIZATION_BLOCKS}


def _decoded(value: Any) -> Any:
    """A value of config.json as a configuration class takes it."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else _without_quantization(value)
    return [_decoded(entry) for entry in value] if isinstance(value, list) else value


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device when a module registers it; buffers stay where they are.

    The hook is torch's own and depends on nothing in transformers. The memory of a large parameter is reserved but
    never written, because initialization comes after registration. The hook is global: it also moves the parameters of
    modules that other threads create meanwhile.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None  # None keeps the parameter object, so tied parameters stay tied
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()
