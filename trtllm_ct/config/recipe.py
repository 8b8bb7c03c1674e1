"""Read the names of the modifiers in an llm-compressor `recipe.yaml`.

Only the recipe shows how weights were calibrated: AWQ and GPTQ checkpoints have the same format. The names alone are
needed, and they are not worth a dependency on a YAML parser.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import ConfigError, Fault
from trtllm_ct.base.regular_files import RECIPE_BYTES

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.source import Source

__all__ = ["read_modifiers"]

_RECIPE = "recipe.yaml"
_COMMENT = re.compile(r"(?:^|\s)#.*")
_MODIFIER_KEY = re.compile(r"""(?<![\w.])(\w+Modifier)["']?\s*:(?!\S)""")


def read_modifiers(source: Source) -> tuple[str, ...]:
    """Return the mapping keys that end in "Modifier", without repetitions, in the order of the file.

    Empty when there is no recipe. Raises `ConfigError` for a recipe that can't be read.
    """
    if not source.has(_RECIPE):
        return ()
    try:
        lines = source.read(_RECIPE, RECIPE_BYTES).decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        remedy = "Make it a file that this user can read, or move it away: it only says how weights were calibrated."
        found = f"{error.strerror or error}".lower()
        raise ConfigError(
            Fault(where=source.where(_RECIPE), expected="a readable recipe", found=found, remedy=remedy)
        ) from None
    names = (name for line in lines for name in _MODIFIER_KEY.findall(_COMMENT.sub("", line)))
    return tuple(dict.fromkeys(names))
