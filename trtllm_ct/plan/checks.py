"""Which checks a plan has passed: what is known to be complete, and by what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_ct.base.json_form import fields_form

if TYPE_CHECKING:
    from trtllm_ct.plan.models.model_class import Comparison
    from trtllm_ct.plan.models.sites import Model

__all__ = ["Check", "checks_of", "checks_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check of a checkpoint.

    `name` is `files`, `codes`, `tables`, `layers` or `class`. `ran` is False if the check was not made; `detail` then
    says why, and otherwise what the tensors were compared with.
    """

    name: str
    ran: bool
    detail: str

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form: the three fields by name."""
        return fields_form(self)


_FILES = Check(name="files", ran=True, detail="headers and index")
_CODES = Check(name="codes", ran=True, detail="shapes of codes and scales")
_LAYERS = Check(name="layers", ran=True, detail="layers and experts of one kind")


def checks_of(model: Model, comparison: Comparison) -> tuple[Check, ...]:
    """Return the checks of a model; `comparison` is that with its class, if its row lists no modules."""
    if model.stated is not None:
        return _FILES, _CODES, Check(name="modules", ran=True, detail=f"modules listed for {model.name}")
    detail = comparison.by or comparison.why_not
    return _FILES, _CODES, _LAYERS, Check(name="class", ran=bool(comparison.by), detail=detail)


def checks_text(checks: tuple[Check, ...]) -> str:
    """Return one line about the checks: what the tensors were compared with, and with what not."""
    line = ", ".join(check.detail for check in checks if check.ran)
    left_out = "; ".join(f"not its class: {check.detail}" for check in checks if not check.ran)
    return f"{line}; {left_out}" if left_out else line
