"""Reorder the rows of query and key weights in Mistral's own form to the order of the Hugging Face form.

This form does not say in which of the two orders the rows of a tensor are stored. It follows from what the
writers and readers of the form do:

| tensor of `wq`, `wk`                 | llm-compressor writes | vLLM reads   | this package                    |
|--------------------------------------|-----------------------|--------------|---------------------------------|
| `weight`, plain or codes             | Mistral's order       | Mistral's    | reorders                        |
| `qscale_weight`, one per row         | Mistral's order       | Mistral's    | reorders                        |
| one number; blocks of whole heads    | no difference         | unchanged    | keeps unchanged                 |
| other tensors with rows, such as     | Mistral's order       | Hugging      | does what `qk_rows` says, or    |
| `weight_packed`, `weight_scale`      |                       | Face's       | refuses without it              |

Where writer and reader contradict each other, nothing in the files tells which order is right, so the user has to say
it with the key `"qk_rows"` in the quantization block: `mistral` for a model that was quantized in Mistral's form,
`hugging_face` for a model that vLLM reads correctly.
Sources: llm-compressor 0.9 `entrypoints/model_free/` and, before it, `experimental/mistral/fp8_ptpc_quantize.py`; vLLM
0.15 `model_executor/models/mistral.py` (`maybe_remap_mistral`), and TensorRT-LLM 1.2
`_torch/models/checkpoints/mistral/weight_mapper.py`, which follows it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import RowOrder
from trtllm_ct.formats.base import Axis
from trtllm_ct.layouts.rotary_rows import halves_of_packed_pairs, halves_of_pairs
from trtllm_ct.layouts.stored_array import StoredArray
from trtllm_ct.plan.stored import View

if TYPE_CHECKING:
    from typing_extensions import Self

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import Packing
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.formats.base import StoredWeight
    from trtllm_ct.layouts.stored_array import StoredTensors
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["QueryKeyRows", "Reordered"]

_ALWAYS_MISTRALS_ORDER = frozenset({"weight", "qscale_weight"})
_WITH_ROWS = frozenset({Axis.ROWS, Axis.TILES})
_HUGGING_FACE_FORM = "Use the Hugging Face form of the model, which has config.json and model*.safetensors."


@dataclass(frozen=True, slots=True, kw_only=True)
class Reordered(View):
    """A tensor whose rows are reordered within each head; memory: its size.

    In the stored tensor the two rows that rotary embeddings rotate together are neighbours. Here one of them is in the
    first half of the head and the other one in the second half. `rows` is N of the weight. With `packing`, several rows
    are packed into one word.
    """

    view: View
    rows: int
    head_dim: int
    packing: Packing | None = None

    @property
    def stored_bytes(self) -> int:
        """The bytes of the stored tensor."""
        return self.view.stored_bytes

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of the stored tensor."""
        return self.view.sources

    def of(self, stored: StoredTensors) -> StoredArray:
        """Return a reordered copy of the tensor."""
        tensor = self.view.of(stored)
        elements = tensor.elements
        if self.packing is not None:
            reordered = halves_of_packed_pairs(elements, self.packing, self.rows, self.head_dim)
        else:
            reordered = halves_of_pairs(elements.reshape(self.rows, -1), self.head_dim).reshape(elements.shape)
        return StoredArray(reordered, tensor.dtype)


@dataclass(slots=True, kw_only=True)
class QueryKeyRows:
    """Reorders the query and key modules of one checkpoint, and collects the tensors that can't be reordered.

    `declared` is the order that the quantization block gives, None without one. `head_dim` and `vision_head_dim` are
    the number of rows per head in the text model and in a vision tower, 0 if there are none.
    """

    declared: RowOrder | None
    head_dim: int
    vision_head_dim: int
    _undeclared: list[str] = field(default_factory=list)
    _immovable: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of_model(cls, config: QuantizationConfig, model: Model) -> Self:
        """Return the value for a quantization block and the sizes of a model."""
        return cls(declared=config.qk_rows, head_dim=model.sizes["head_dim"], vision_head_dim=model.vision_head_dim)

    def ordered(self, module: StoredModule, weight: StoredWeight | None) -> StoredModule:
        """Return the module with the row order of the Hugging Face form.

        A module without queries or keys in Mistral's own form is returned unchanged. `weight` is None for a plain
        module.
        """
        if module.alias is None or not module.alias.endswith((".attention.wq", ".attention.wk")):
            return module
        views = {local: self._ordered_view(module, local, weight) for local in module.views}
        return replace(module, views=views)

    def report(self, faults: FaultCollector) -> None:
        """Add one fault for all tensors of unknown order, and one for each reason why tensors can't be reordered."""
        if self._undeclared:
            names = ", ".join(sorted({name.rpartition(".")[2] for name in self._undeclared}))
            faults.add(
                where=self._undeclared[0],
                expected="rows of queries and keys in an order that is known",
                found=f"Mistral's own form, in which nothing tells it ({len(self._undeclared)} tensors: {names})",
                remedy='Add "qk_rows": "mistral" to the quantization block if the model was quantized in this form, as '
                'llm-compressor does it, or "qk_rows": "hugging_face" if vLLM gives correct results with it. '
                f"Or better: {_HUGGING_FACE_FORM[0].lower()}{_HUGGING_FACE_FORM[1:]}",
            )
        for reason, tensors in self._immovable.items():
            faults.add(
                where=tensors[0],
                expected="rows of queries and keys that can be put into the order of Hugging Face's form",
                found=f"{reason} ({len(tensors)} tensors)",
                remedy=_HUGGING_FACE_FORM,
            )

    def _ordered_view(self, module: StoredModule, local: str, weight: StoredWeight | None) -> View:
        """Return one tensor in the order of the Hugging Face form; unchanged if it can't be reordered."""
        view = module.views[local]
        head_dim = self._head_dim(module)
        if not _has_rows(local, view, weight, head_dim):
            return view
        always_mistrals = view.sources[0].rpartition(".")[2] in _ALWAYS_MISTRALS_ORDER
        if not always_mistrals and self.declared is RowOrder.HUGGING_FACE:
            return view
        rows = weight.shape[0] if weight else view.spec.shape[0]
        obstacle = _obstacle(module, local, weight, rows, head_dim)
        if obstacle:
            self._immovable[obstacle].append(view.sources[0])
        elif not always_mistrals and self.declared is None:
            self._undeclared.append(view.sources[0])
        else:
            packing = weight.zero_point_packing if weight and local == weight.zero_point else None
            return Reordered(spec=view.spec, view=view, rows=rows, head_dim=head_dim, packing=packing)
        return view

    def _head_dim(self, module: StoredModule) -> int:
        """Return the number of rows per head of a module in the text model or in the vision tower."""
        return self.vision_head_dim if module.stored_name.startswith("vision_encoder.") else self.head_dim


def _has_rows(local: str, view: View, weight: StoredWeight | None, head_dim: int) -> bool:
    """Whether a tensor depends on the order of the rows within heads."""
    if weight is None or local == "bias":
        return local in {"weight", "bias"} and len(view.spec.shape) > 0
    axis = weight.axes.get(local)
    if axis in _WITH_ROWS:
        return True
    if axis is not Axis.SCALE_ROWS or weight.scale_shape[0] == 1 or view.spec.numel == 1:
        return False
    whole_heads = weight.block_rows > 1 and head_dim > 0 and weight.block_rows % head_dim == 0
    return not whole_heads


def _obstacle(module: StoredModule, local: str, weight: StoredWeight | None, rows: int, head_dim: int) -> str:
    """Return why the rows of a tensor can't be reordered; empty if they can."""
    if any(transform.location == "output" for transform in module.transforms):
        return "a transform that mixes them"
    if head_dim <= 0 or head_dim % 2 or rows % head_dim:
        return f"{rows} rows in heads of {head_dim}"
    if weight is not None and not weight.has_rows:
        return f"{weight.format.name}, whose tiles cross heads"
    if weight is not None and local != weight.codes and weight.block_rows > 1:
        return f"blocks of {weight.block_rows} rows that cross heads of {head_dim}"
    return ""
