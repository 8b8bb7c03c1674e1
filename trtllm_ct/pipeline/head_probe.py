"""Compare a stored head with the embeddings that config.json ties it to, byte by byte.

Memory: one chunk of each, whatever their size. The comparison ends at the first difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.checkpoint.reader import Run
from trtllm_ct.checkpoint.runs import read_runs
from trtllm_ct.plan.tied_head import own_tensors, tied_pair

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.base.schemes import TensorSpec
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["head_equals_table"]

_CHUNK_BYTES = 4 << 20


def head_equals_table(model: Model, stored: Mapping[str, StoredModule], catalog: Catalog) -> bool:
    """Whether the stored head of a tied model has the tensors of the stored table: dtypes, shapes and bytes.

    False if config.json ties no head, or if not both are stored. Quantized weights are compared by their tensors, so a
    head in another format counts as different. Raises `CatalogError` when a file is gone or shorter than its header
    says.
    """
    pair = tied_pair(model, stored, model.place(stored))
    if pair is None:
        return False
    tables, heads = (own_tensors(module) for module in pair)
    if tables.keys() != heads.keys():
        return False
    names = [
        (first, second)
        for local, table in tables.items()
        for first, second in zip(table.sources, heads[local].sources, strict=False)
    ]
    same_forms = all(
        table.spec == heads[local].spec and len(table.sources) == len(heads[local].sources)
        for local, table in tables.items()
    )
    return same_forms and all(_equal_tensors(catalog, first, second) for first, second in names)


def _equal_tensors(catalog: Catalog, first: str, second: str) -> bool:
    """Whether two stored tensors have the same dtype, shape and bytes."""
    specs = [catalog.tensors[name].spec for name in (first, second)]
    if specs[0] != specs[1]:
        return False
    chunks = (_chunks(catalog, name, specs[0]) for name in (first, second))
    return all(a == b for a, b in zip(*chunks, strict=True))


def _chunks(catalog: Catalog, name: str, spec: TensorSpec) -> Iterator[bytes]:
    """Yield the bytes of a stored tensor in order, at most `_CHUNK_BYTES` at a time."""
    step = max(1, _CHUNK_BYTES // spec.dtype.itemsize)
    for begin in range(0, spec.numel, step):
        for _, data in read_runs(catalog, [Run(name, begin, min(begin + step, spec.numel))]):
            yield data
