"""Read the names of the modifiers in an llm-compressor `recipe.yaml`.

Only the recipe shows how weights were calibrated: AWQ and GPTQ checkpoints have the same format. The names alone are
needed, and they are not worth a dependency on a YAML parser.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read_modifiers"]

_COMMENT = re.compile(r"(?:^|\s)#.*")
_MODIFIER_KEY = re.compile(r"""(?<![\w.])(\w+Modifier)["']?\s*:(?!\S)""")


def read_modifiers(directory: Path) -> tuple[str, ...]:
    """Return the mapping keys that end in "Modifier", without repetitions, in the order of the file.

    Empty when the directory holds no recipe.
    """
    recipe = directory / "recipe.yaml"
    if not recipe.is_file():
        return ()
    lines = recipe.read_text(encoding="utf-8", errors="replace").splitlines()
    names = (name for line in lines for name in _MODIFIER_KEY.findall(_COMMENT.sub("", line)))
    return tuple(dict.fromkeys(names))
