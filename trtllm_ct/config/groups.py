"""Read the JSON of `config_groups` as `ConfigGroup` values.

A group is written in one of three forms: a full scheme, a preset name, or the short form of TensorRT-LLM's
documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from trtllm_ct.base.schemes import CompressionFormat, QuantScheme
from trtllm_ct.config.arguments import ARGUMENT_KEYS, read_activation_args, read_weight_args
from trtllm_ct.config.json_object import JsonObject
from trtllm_ct.config.presets import PRESETS, former_meaning, parse_release, preset_scheme
from trtllm_ct.config.quantization_config import ConfigGroup

__all__ = ["read_groups"]

_LINEAR = "Linear"
_ARGUMENTS = ("weights", "input_activations", "output_activations")
_GROUP_KEYS = ("targets", *_ARGUMENTS, "format")


_MAX_GROUPS = 10_000
"""The most groups that are read; a model with a scheme of its own for each of its Linears has some thousands."""

_FEWER_GROUPS = "Give modules with the same scheme one group, or take config.json from where it was published."


def read_groups(
    groups: JsonObject,
    *,
    global_format: CompressionFormat | None,
    version: str | None,
) -> tuple[ConfigGroup, ...]:
    """Read all groups, in the order of the config; `version` is that of the release that wrote them, if known."""
    if len(groups.raw) > _MAX_GROUPS:
        found = f"{len(groups.raw)} groups"
        expected = f"at most {_MAX_GROUPS} groups"
        groups.findings.collector.add(where=groups.where, expected=expected, found=found, remedy=_FEWER_GROUPS)
        return ()
    # "mixed-precision" means that each group has its own format.
    inherited = None if global_format is CompressionFormat.MIXED_PRECISION else global_format
    config_groups = tuple(
        _read_group(groups, name, inherited)
        if isinstance(value, Mapping)
        else _read_preset(groups, name, inherited, version)
        for name, value in groups.raw.items()
    )
    _warn_of_shared_targets(groups, config_groups)
    return config_groups


def _read_group(groups: JsonObject, name: str, inherited: CompressionFormat | None) -> ConfigGroup:
    """Read a group that is a JSON object; `inherited` is the format of groups that declare none."""
    group = JsonObject(groups.raw[name], groups.path(name), groups.findings)
    short = _short_weights(group)
    if not short:
        group.warn_unknown(_GROUP_KEYS)
    scheme = QuantScheme(
        weights=read_weight_args(short or group.child("weights")),
        input_activations=read_activation_args(group.child("input_activations")),
        output_activations=read_activation_args(group.child("output_activations")),
        format=_declared_format(group) or inherited,
    )
    return ConfigGroup(name=name, targets=_targets(groups, group), scheme=scheme)


def _short_weights(group: JsonObject) -> JsonObject | None:
    """Return the weight arguments of a group in short form, or None for a group in any other form.

    In the short form of TensorRT-LLM's documentation, the arguments of the weights are in the group itself.
    """
    if any(key in group.raw for key in _ARGUMENTS) or not any(key in group.raw for key in ARGUMENT_KEYS):
        return None
    arguments = {key: value for key, value in group.raw.items() if key not in _GROUP_KEYS}
    return JsonObject(arguments, group.where, group.findings)


def _declared_format(group: JsonObject) -> CompressionFormat | None:
    """Return the group's own format; mixed-precision is a fault, because it is not the format of a group."""
    declared = group.choice("format", CompressionFormat, None)
    if declared is CompressionFormat.MIXED_PRECISION:
        group.fault("format", expected="the format of this group; mixed-precision is a label of whole checkpoints")
    return declared


def _targets(groups: JsonObject, group: JsonObject) -> tuple[str, ...]:
    """Return the targets of a group; a group that is alone and declares none targets every Linear."""
    if group.raw.get("targets") is not None:
        return _read_targets(group, "targets")
    if len(groups.raw) > 1:
        group.fault(
            "targets",
            expected="a list of module names, classes or `re:` patterns",
            remedy="Name the modules of each group; with several groups nothing else says which belong to which.",
        )
        return ()
    group.warn("declares no targets; as the only group it is read as every Linear")
    return (_LINEAR,)


def _read_targets(source: JsonObject, key: str) -> tuple[str, ...]:
    targets = source.patterns(key)
    if not source.raw[key]:
        source.warn(f"{key} is empty, so the group applies to no module")
    # TensorRT-LLM's documentation writes the target "weight" where the library writes "Linear".
    return tuple(_LINEAR if target == "weight" else target for target in targets)


def _read_preset(
    groups: JsonObject,
    name: str,
    inherited: CompressionFormat | None,
    version: str | None,
) -> ConfigGroup:
    """Read a group whose name is a preset and whose value is a list of targets."""
    release = parse_release(version)
    scheme = preset_scheme(name, release)
    if scheme is None or groups.raw[name] is None:
        groups.fault(
            name,
            expected="a JSON object, or a list of targets under a preset name",
            remedy=f"Preset names are {', '.join(PRESETS)}; any other group needs its arguments spelled out.",
        )
        return ConfigGroup(name=name, targets=(), scheme=QuantScheme())
    former = former_meaning(name)
    if former and release is None:
        major, minor = former.until
        groups.warn(
            f"the preset {name} is read as {scheme.label()}, but releases before {major}.{minor} meant "
            f"{former.scheme.label()}, and no version says which release wrote this"
        )
    return ConfigGroup(name=name, targets=_read_targets(groups, name), scheme=replace(scheme, format=inherited))


def _warn_of_shared_targets(groups: JsonObject, config_groups: tuple[ConfigGroup, ...]) -> None:
    """Warn about targets that several groups declare."""
    owners: dict[str, str] = {}
    for group in config_groups:
        for target in dict.fromkeys(group.targets):
            if target in owners:
                both = f"{owners[target]} and {group.name} both target {target!r}"
                groups.warn(f"{both}; the last one that fits the tensors counts")
            owners[target] = group.name
