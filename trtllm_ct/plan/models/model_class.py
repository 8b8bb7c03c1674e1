"""Compare the tensors of a checkpoint with those of a model class, such as that of transformers.

Here is what planning asks of a class and does with the answer; `pipeline/transformers_class.py` builds the class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_ct.plan.models.expert_spellings import UNKNOWN_SPELLING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.plan.models.expert_spellings import ExpertSpelling
    from trtllm_ct.plan.models.plain_tensors import PlainTensors

__all__ = ["Comparison", "Misfit", "ModelClass"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """A parameter of a class whose stored tensors have another size.

    `name` is the parameter, `sources` are the stored tensors that it is made from, `expected` its shape, and `found`
    says which one they make.
    """

    name: str
    sources: tuple[str, ...]
    expected: tuple[int, ...]
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How the tensors of a checkpoint fit a class.

    `by` names the class and the release of its library. `why_not` says why they could not be compared; the other
    fields are then empty. `missing` are the parameters of the class that no stored tensor becomes, with their shapes,
    `present` all others, and `unread` the stored tensors that the class has no parameter for. `parts` are the models
    beside the text model of the class, such as a vision tower, with the names of their parameters, and `text` are the
    parameters of the text model and its head. `renamed` are missing parameters that may be stored under another name,
    and `absent` the parts of which most parameters are missing.
    """

    by: str = ""
    why_not: str = ""
    missing: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    present: frozenset[str] = field(default=frozenset(), repr=False)
    misfits: tuple[Misfit, ...] = ()
    unread: frozenset[str] = frozenset()
    parts: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)
    text: frozenset[str] = field(default=frozenset(), repr=False)
    renamed: frozenset[str] = frozenset()
    absent: tuple[str, ...] = ()


class ModelClass(ABC):
    """A model class whose parameters a checkpoint can be compared with."""

    @abstractmethod
    def compare(self, tensors: PlainTensors) -> Comparison:
        """Compare plain tensors, under the names of the files, with the parameters of the class.

        A tensor without a shape counts as present, whatever its size.
        """

    def expert_spelling(self, owners: Iterable[str]) -> ExpertSpelling:  # noqa: ARG002 (this class tells nothing)
        """Return how the class reads routed experts; `UNKNOWN_SPELLING` if it doesn't tell.

        `owners` are the names of the modules of all experts in the files, such as `model.layers.3.mlp.experts`.
        """
        return UNKNOWN_SPELLING
