"""The stored tensors of a checkpoint, gathered by module, with the quantized weights told from the plain ones.

What a module is gets decided by the tensors that exist; the configuration only gives the parameters. Status fields,
`ignore` and even `targets` disagree with the files often enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.schemes import TensorSpec

__all__ = ["QUANTIZATION_TENSORS", "StoredModule", "stored_modules"]

QUANTIZATION_TENSORS = frozenset(
    {
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
        "input_scale",
        "input_zero_point",
        "input_global_scale",
        "output_scale",
        "output_zero_point",
        "k_scale",
        "k_zero_point",
        "v_scale",
        "v_zero_point",
        "q_scale",
        "q_zero_point",
        "scale_packed",
        "compressed",
        "bitmask",
        "row_offsets",
    }
)
"""Local names that compressed-tensors gives to parameters of quantization or sparsity (0.4 to 0.20)."""


@dataclass(frozen=True, slots=True)
class StoredModule:
    """The tensors of one module by local name."""

    name: str
    specs: Mapping[str, TensorSpec]

    def full_name(self, local: str) -> str:
        """The name in the file."""
        return f"{self.name}.{local}" if self.name else local

    def full_names(self, locals_: Iterable[str]) -> tuple[str, ...]:
        """The names in the file."""
        return tuple(self.full_name(local) for local in locals_)

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is stored as codes: packed, sparse, or of a dtype that no plain weight has."""
        if {"weight_packed", "compressed", "bitmask"} & self.specs.keys():
            return True
        weight = self.specs.get("weight")
        return weight is not None and not weight.dtype.is_wide_float


def stored_modules(catalog: Catalog) -> dict[str, StoredModule]:
    """The modules of a checkpoint by name, in the order of the catalog."""
    gathered: dict[str, dict[str, TensorSpec]] = {}
    for name, tensor in catalog.tensors.items():
        module, _, local = name.rpartition(".")
        gathered.setdefault(module, {})[local] = tensor.spec
    return {module: StoredModule(module, specs) for module, specs in gathered.items()}
