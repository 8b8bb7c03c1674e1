"""`TransformersClass`: the class of transformers that config.json names, on the meta device, without any weights.

Nothing is downloaded and no code of a checkpoint runs: only classes of the installed transformers are built, from the
keys of config.json. transformers says by which names a class reads files (`conversion_mapping.py`); where a release of
transformers doesn't work as expected, the result says so, and nothing is compared.

Source: transformers 5.23 `core_model_loading.py: convert_and_load_state_dict_in_model`; 4.57 `modeling_utils.py:
_get_key_renaming_mapping`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.packages import PACKAGES
from trtllm_ct.plan.models.class_row import PROJECTION_NAMES
from trtllm_ct.plan.models.expert_spellings import NUMBERED, UNKNOWN_SPELLING, ExpertSpelling, StackedExperts
from trtllm_ct.plan.models.model_class import Comparison, Misfit, ModelClass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from trtllm_ct.plan.models.plain_tensors import PlainTensors, Shape

__all__ = ["TransformersClass"]

# Keys that choose an implementation, which may need a package that is not installed, or say how weights are stored.
_LEFT_OUT = frozenset({"quantization_config", "compression_config", "attn_implementation", "_attn_implementation"})

# transformers 5.23 `configuration_utils.py: _decode_special_floats`: Infinity and NaN are written as such objects.
_SPECIAL_FLOAT = "__float__"

_Named = tuple[str, "str | None"]
"""The parameter that a stored tensor becomes, and the pattern of the conversion that it needs, None without one."""

_Members = list[tuple[str, "str | None", "Shape | None"]]
"""The stored tensors that become one parameter: name, pattern and shape of each."""


class TransformersClass(ModelClass):
    """The class of transformers for a parsed config.json. transformers is imported when tensors are compared."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._made: tuple[Any, str] | None = None

    def compare(self, tensors: PlainTensors) -> Comparison:
        """Compare plain tensors with the parameters of the class; takes a second for 25,000 tensors."""
        model, said = self._model()
        if model is None:
            return Comparison(why_not=said)
        with _quietly_offline():
            try:
                return _compare(model, tensors, said)
            # Classes raise whatever they like for a configuration that they don't expect.
            except Exception as error:  # noqa: BLE001
                return Comparison(why_not=f"{said} was not compared ({_message(error)})")

    def expert_spelling(self, owners: Iterable[str]) -> ExpertSpelling:
        """Return how the class reads routed experts, by its parameters and by the names that transformers merges."""
        model, _ = self._model()
        if model is None:
            return UNKNOWN_SPELLING
        with _quietly_offline():
            try:
                return _expert_spelling(model, owners)
            except Exception:  # noqa: BLE001 (as above; `compare` says why)
                return UNKNOWN_SPELLING

    def _model(self) -> tuple[Any, str]:
        """Return the model, with its name and release; or None, with the reason why there is none."""
        if self._made is None:
            self._made = _model_of(self._config)
        return self._made


def _model_of(config: Mapping[str, Any]) -> tuple[Any, str]:
    """Return what `TransformersClass._model` does."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(config.get("model_type"), str):
        return None, "config.json names no class of transformers"
    if not PACKAGES["transformers"].installed:
        return None, "transformers is not installed"
    import transformers

    name, release = str(names[0]), f"transformers {transformers.__version__}"
    with _quietly_offline():
        try:
            model = _build(name, config)
        except Exception as error:  # noqa: BLE001 (as in `compare`)
            return None, f"{name} of {release} was not built ({_message(error)})"
    return model, f"{release} has no class {name}" if model is None else f"{name} of {release}"


def _message(error: Exception) -> str:
    """Return the type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _build(name: str, config: Mapping[str, Any]) -> Any:
    """Return the model on the meta device; None if transformers has no such class for this type of model."""
    import torch
    import transformers

    model_class = getattr(transformers, name, None)
    config_class = getattr(model_class, "config_class", None)
    if model_class is None or config_class is None or config_class.model_type != config["model_type"]:
        return None
    with torch.device("meta"):
        return model_class(config_class.from_dict(_as_read(config)))


def _as_read(value: Any) -> Any:
    """Return a value of config.json as transformers reads it, without keys that say nothing about parameters."""
    if isinstance(value, list):
        return [_as_read(entry) for entry in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {_SPECIAL_FLOAT}:
        return float(value[_SPECIAL_FLOAT])
    return {key: _as_read(entry) for key, entry in value.items() if key not in _LEFT_OUT}


def _compare(model: Any, tensors: PlainTensors, by: str) -> Comparison:
    """Give each tensor its parameter, and compare shapes; tied parameters need only one tensor."""
    parameters = model.state_dict(keep_vars=True)
    name_of, convert = _readers(model, parameters)
    sources: dict[str, list[tuple[str, str | None]]] = {}
    unread = set()
    for name in tensors:
        target, pattern = name_of(name)
        if target in parameters:
            sources.setdefault(target, []).append((name, pattern))
        else:
            unread.add(name)
    present: set[str] = set()
    misfits = []
    for target, members in sources.items():
        made = convert(target, [(name, pattern, tensors[name]) for name, pattern in members])
        present |= made.keys()
        for parameter, shape in made.items():
            expected = tuple(parameters[parameter].shape) if parameter in parameters else shape
            if shape is not None and shape != expected and not _spares_experts(parameter, shape, parameters):
                found = f"shape {list(shape)}" if shape else "tensors that don't fit together"
                names = tuple(name for name, _ in members)
                misfits.append(Misfit(name=parameter, sources=names, expected=expected or (), found=found))
    tied = {id(parameters[name]) for name in present if name in parameters}
    missing = [name for name in parameters if name not in present and id(parameters[name]) not in tied]
    return Comparison(
        by=by,
        missing={
            name: tuple(parameters[name].shape)
            for name in _not_matching(missing, model._keys_to_ignore_on_load_missing)  # noqa: SLF001
        },
        present=frozenset(present),
        misfits=tuple(misfits),
        parts=_parts(model, parameters),
        text=_text_parameters(model, parameters),
        unread=frozenset(_not_matching(unread, model._keys_to_ignore_on_load_unexpected)),  # noqa: SLF001
    )


def _spares_experts(name: str, shape: tuple[int, ...], parameters: Mapping[str, Any]) -> bool:
    """Whether a class has a stack for more experts than have weights, and these tensors are all that have.

    Experts that pass their input on have none: LongCat-Flash has a place for them in `gate_up_proj`, but not in
    `down_proj` (transformers 5.23 `modeling_longcat_flash.py: LongcatFlashExperts`).
    """
    around, _, leaf = name.rpartition(".")
    down = parameters.get(f"{around}.down_proj")
    if leaf != "gate_up_proj" or down is None or name not in parameters:
        return False
    whole = tuple(parameters[name].shape)
    return len(shape) == len(whole) and shape[1:] == whole[1:] and shape[0] == down.shape[0] < whole[0]


# The tensors of all experts, with the projections that each holds as positions in (gate, up, down).
_STACKS: Mapping[str, tuple[int, ...]] = {"gate_up_proj": (0, 1), "gate_proj": (0,), "up_proj": (1,), "down_proj": (2,)}


def _expert_spelling(model: Any, owners: Iterable[str]) -> ExpertSpelling:
    """Return how a model reads the routed experts of the first of these modules that it has."""
    parameters = model.state_dict(keep_vars=True)
    name_of, _ = _readers(model, parameters)
    for owner in owners:
        for names in (PROJECTION_NAMES, NUMBERED):
            # Some classes have no gate.
            if all(name_of(f"{owner}.0.{name}.weight")[0] in parameters for name in names[1:]):
                return ExpertSpelling(projections=names)
        stacked = _stacks_of(model, parameters, owner, name_of)
        if stacked is not None:
            return ExpertSpelling(stacked=stacked)
    return UNKNOWN_SPELLING


def _stacks_of(
    model: Any, parameters: Mapping[str, Any], owner: str, name_of: Callable[[str], _Named]
) -> StackedExperts | None:
    """Return the stacks of a module of all experts; None if the order of their axes or rows is not known.

    Source: transformers 5.23 `integrations/moe.py: use_experts_implementation`, which marks modules of experts.
    """
    read = {leaf: name_of(f"{owner}.{leaf}") for leaf in _STACKS}
    # A stack that transformers converts is stored in another order than the module has it in.
    stacks = {leaf: name for leaf, (name, pattern) in read.items() if name in parameters and pattern is None}
    if "down_proj" not in stacks or len(stacks) == 1:
        return None
    module = model.get_submodule(stacks["down_proj"].rpartition(".")[0])
    if not hasattr(module, "is_transposed") or not hasattr(module, "is_concatenated"):
        return None
    experts = owner.rpartition(".")[2]
    biases = {
        f"{experts}.{leaf}_bias": _STACKS[leaf] for leaf in stacks if name_of(f"{owner}.{leaf}_bias")[0] in parameters
    }
    return StackedExperts(
        parts={f"{experts}.{leaf}": _STACKS[leaf] for leaf in stacks},
        inputs_first=module.is_transposed,
        alternate=not module.is_concatenated,
        biases=biases or None,
    )


def _parts(model: Any, parameters: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the models beside the text model, each with the parameters that no model further inside has.

    Towers have a configuration of their own. The base model, the text model, and both stacks of an encoder-decoder are
    parts that every checkpoint of the class has.
    """
    from transformers import PreTrainedModel

    if model.config.is_encoder_decoder:
        return {}
    main = {type(model.config), type(model.config.get_text_config())}
    text = _module_of(model.get_input_embeddings)
    inside = [
        name
        for name, module in model.named_modules()
        if name
        and isinstance(module, PreTrainedModel)
        and type(module.config) not in main
        and all(child is not text for child in module.modules())
    ]
    if not inside and len(main) > 1:  # no tower: embeddings of images stand beside the text model alone
        inside = [
            f"{model.base_model_prefix}.{name}"
            for name, module in model.base_model.named_children()
            if all(child is not text for child in module.modules())
        ]
    inside.sort(key=len, reverse=True)
    parts: dict[str, set[str]] = {}
    for name in parameters:
        part = next((part for part in inside if name.startswith(f"{part}.")), None)
        if part is not None:
            parts.setdefault(part, set()).add(name)
    return {part: frozenset(names) for part, names in parts.items()}


def _text_parameters(model: Any, parameters: Iterable[str]) -> frozenset[str]:
    """Return the parameters of the text model and its head; all if no model is inside of the class."""
    from transformers import PreTrainedModel

    table, head = _module_of(model.get_input_embeddings), _module_of(model.get_output_embeddings)
    holders = [name for name, module in model.named_modules() if any(child is table for child in module.modules())]
    models = [name for name in holders if isinstance(model.get_submodule(name), PreTrainedModel)]
    prefixes = [f"{max(models, key=len)}." if models and max(models, key=len) else ""]
    prefixes += [f"{name}." for name, module in model.named_modules() if module is head and head is not None]
    return frozenset(name for name in parameters if name.startswith(tuple(prefixes)))


def _module_of(getter: Callable[[], Any]) -> Any:
    """Return the embeddings or the head of a model; None if its class has none."""
    try:
        return getter()
    except (AttributeError, NotImplementedError):
        return None


def _readers(
    model: Any, parameters: Mapping[str, Any]
) -> tuple[Callable[[str], _Named], Callable[[str, _Members], dict[str, Shape | None]]]:
    """Return how transformers renames a stored tensor for this model, and how it makes parameters from several."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return _renaming_of_release_4(model, parameters), _converting({}, model)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def name_of(name: str) -> _Named:
        prefix = model.base_model_prefix
        renamed: _Named = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed[0] not in parameters and name in parameters:
            return name, None
        return renamed

    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    return name_of, _converting(by_pattern, model)


def _renaming_of_release_4(model: Any, parameters: Mapping[str, Any]) -> Callable[[str], _Named]:
    """Return how transformers 4 renames a stored tensor: by the first pattern of its class that matches."""
    patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    prefix = f"{model.base_model_prefix}."

    def name_of(name: str) -> _Named:
        for pattern, replacement in patterns.items():
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                name = renamed
                break
        spellings = (name, prefix + name, name.removeprefix(prefix))
        return next((spelling for spelling in spellings if spelling in parameters), name), None

    return name_of


def _converting(by_pattern: Mapping[str, Any], model: Any) -> Callable[[str, _Members], dict[str, Shape | None]]:
    """Return a function that says which parameters of which shapes some stored tensors become.

    A shape is None if it is not known, and () for tensors that can't be joined.
    """
    import torch

    def convert(target: str, members: _Members) -> dict[str, Shape | None]:
        pattern = next((pattern for _, pattern, _ in members if pattern is not None), None)
        if pattern is None:
            return {target: members[-1][2]}
        converter = deepcopy(by_pattern[pattern])
        names = converter.target_patterns
        if any(shape is None for _, _, shape in members):
            return {target.replace(names[0], name): None for name in names}
        for name, part, shape in members:
            converter.add_tensor(target, name, part, torch.empty(shape or (), device="meta"))
        try:
            made = converter.convert(target, model=model, config=model.config)
        except (RuntimeError, ValueError):
            return {target.replace(names[0], name): () for name in names}
        parts = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {name: tuple(part.shape) for name, part in parts.items()}

    return convert


def _not_matching(names: Iterable[str], patterns: Iterable[str] | None) -> Iterator[str]:
    """Yield the names that match none of these patterns."""
    compiled = [re.compile(pattern) for pattern in patterns or ()]
    yield from (name for name in names if not any(pattern.search(name) for pattern in compiled))


@contextmanager
def _quietly_offline() -> Iterator[None]:
    """Let transformers neither fetch anything nor log; what was set before is restored."""
    import huggingface_hub.constants as hub
    from transformers.utils import logging

    offline, verbosity = hub.HF_HUB_OFFLINE, logging.get_verbosity()
    hub.HF_HUB_OFFLINE = True
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
