"""Read the JSON of `transform_config` as `Transform` values: rotations, folded into the weights or stored beside them.

Fields and defaults are those of compressed-tensors 0.20 transform/transform_scheme.py and transform_args.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.str_enum import StrEnum
from trtllm_ct.config.quantization_config import Transform

if TYPE_CHECKING:
    from trtllm_ct.config.json_object import JsonObject

__all__ = ["read_transforms"]

_CONFIG_KEYS = ("config_groups",)
_SCHEME_KEYS = ("type", "apply", "randomize", "head_dim", "precision")
_SCHEME_IGNORED_KEYS = ("requires_grad",)
_APPLY_KEYS = ("targets", "location", "inverse", "ignore")


class _Type(StrEnum):
    HADAMARD = "hadamard"
    RANDOM_HADAMARD = "random-hadamard"
    RANDOM_MATRIX = "random-matrix"


class _Location(StrEnum):
    INPUT = "input"
    WEIGHT_INPUT = "weight_input"
    WEIGHT_OUTPUT = "weight_output"
    OUTPUT = "output"
    K_CACHE = "k_cache"
    Q_ATTN = "q_attn"


def read_transforms(config: JsonObject | None) -> tuple[Transform, ...]:
    """Return one `Transform` per `apply` entry of each transform; none for null and for an empty object."""
    if config is None or not config.raw:
        return ()
    config.warn_unknown(_CONFIG_KEYS)
    groups = config.child("config_groups")
    if groups is None:
        config.fault("config_groups", expected="a JSON object of transforms by name")
        return ()
    schemes = ((name, groups.child(name)) for name in groups.raw)
    return tuple(transform for name, scheme in schemes if scheme for transform in _read_scheme(name, scheme))


def _read_scheme(name: str, scheme: JsonObject) -> list[Transform]:
    """Return one `Transform` per `apply` entry of the transform called `name`."""
    transform_type = scheme.required_choice("type", _Type)
    randomize = scheme.boolean("randomize", default=False)
    head_dim = scheme.integer("head_dim", None)
    precision = scheme.dtype("precision") or "float32"
    scheme.warn_unknown(_SCHEME_KEYS, _SCHEME_IGNORED_KEYS)
    transforms = []
    for entry in scheme.children("apply"):
        entry.warn_unknown(_APPLY_KEYS)
        transforms.append(
            Transform(
                name=name,
                type=str(transform_type),
                location=str(entry.required_choice("location", _Location)),
                targets=entry.patterns("targets"),
                ignore=entry.patterns("ignore"),
                inverse=entry.boolean("inverse", default=False),
                randomize=randomize,
                head_dim=head_dim,
                precision=precision,
            )
        )
    return transforms
