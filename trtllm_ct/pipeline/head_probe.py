"""Compare a stored head with the embeddings that config.json ties it to, byte by byte.

Memory: one chunk of each, whatever their size. The comparison ends at the first difference.
Of files that are far away only samples are compared: heads that differ do so nearly everywhere, as other numbers were
trained or rounded. Where the samples are equal, the heads are taken for equal, and that is said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.checkpoint.reader import Run
from trtllm_ct.checkpoint.runs import read_runs
from trtllm_ct.plan.tied_head import own_tensors, tied_pair

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.plan.models.sites import Model
    from trtllm_ct.plan.stored import StoredModule

__all__ = ["head_equals_table", "sampled_head"]

_CHUNK_BYTES = 4 << 20
_SAMPLE_BYTES = 1 << 18
_SAMPLES = 8

_SAMPLED = (
    "{head} was not read as a whole: {samples} samples of {nbytes} bytes equal {table}, to which config.json ties it, "
    "so it is planned as the same weight; a downloaded checkpoint is compared byte by byte"
)


def sampled_head(model: Model, stored: Mapping[str, StoredModule], catalog: Catalog) -> tuple[str, ...]:
    """Return a warning if a head that equals the embeddings was compared by samples only."""
    pair = tied_pair(model, stored, model.place(stored))
    if pair is None or not any(
        _is_sampled(catalog, name) for view in own_tensors(pair[1]).values() for name in view.sources
    ):
        return ()
    table, head = pair
    return (_SAMPLED.format(head=head.name, table=table.name, samples=_SAMPLES, nbytes=_SAMPLE_BYTES),)


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
    chunks = (_chunks(catalog, name) for name in (first, second))
    return all(a == b for a, b in zip(*chunks, strict=True))


def _chunks(catalog: Catalog, name: str) -> Iterator[bytes]:
    """Yield the bytes of a stored tensor that are compared, in order, a chunk at a time."""
    for begin, end in _spans(catalog, name):
        for _, data in read_runs(catalog, [Run(name, begin, end)]):
            yield data


def _spans(catalog: Catalog, name: str) -> list[tuple[int, int]]:
    """Return which elements of a stored tensor are compared: all of them, or samples if they are far away."""
    spec = catalog.tensors[name].spec
    if not _is_sampled(catalog, name):
        step = max(1, _CHUNK_BYTES // spec.dtype.itemsize)
        return [(begin, min(begin + step, spec.numel)) for begin in range(0, spec.numel, step)]
    length = _SAMPLE_BYTES // spec.dtype.itemsize
    last = spec.numel - length
    return [(begin, begin + length) for begin in (last * index // (_SAMPLES - 1) for index in range(_SAMPLES))]


def _is_sampled(catalog: Catalog, name: str) -> bool:
    """Whether only samples of a stored tensor are compared."""
    return catalog.source.weights_folder is None and catalog.tensors[name].spec.nbytes > _SAMPLES * _SAMPLE_BYTES
