"""Names of the modifiers in an llm-compressor `recipe.yaml`.

The recipe is the only witness of how weights were calibrated: AWQ and GPTQ checkpoints have the same format.
Nothing but names is needed, and no YAML parser is worth a dependency for that.
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
    """Names that end in "Modifier" and are used as mapping keys, each once, in the order of the file.

    Empty when the directory holds no recipe.
    """
    recipe = directory / "recipe.yaml"
    if not recipe.is_file():
        return ()
    lines = recipe.read_text(encoding="utf-8", errors="replace").splitlines()
    names = (name for line in lines for name in _MODIFIER_KEY.findall(_COMMENT.sub("", line)))
    return tuple(dict.fromkeys(names))
