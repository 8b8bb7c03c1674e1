"""`probe_checkpoint`: the few values of a checkpoint that decide a mode, read before it is planned.

| tensor                                      | read of                                   | tells               |
|---------------------------------------------|-------------------------------------------|---------------------|
| `weight_global_scale`, `input_global_scale` | parts of one Linear                       | what they can share |
| `weight_scale` of NVFP4                     | such parts, powers of two apart           | what a shift loses  |
| `weight_zero_point`                         | weights that their scheme calls symmetric | whether it is zero  |
| `weight_g_idx`                              | weights with several groups               | whether to reorder  |
| `shape`                                     | tensors that are stored sparse            | the last axis       |

One pass over the names tells whether there is anything to read; most checkpoints have nothing. Bytes are read where
headers say that they lie, and neither torch nor numpy is imported. Whether values are good is not asked here: a NaN is
carried along as one, and refused when the tensor is loaded.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PlanError
from trtllm_ct.checkpoint.runs import read_runs
from trtllm_ct.formats.group_index import GROUP_INDEX
from trtllm_ct.formats.sparse.pieces import shape_pieces
from trtllm_ct.layouts.e4m3 import exact_powers
from trtllm_ct.layouts.raw_bytes import integers, is_contiguous_index, is_zero, is_zero_packed, number
from trtllm_ct.plan.equalize import powers_of_two_apart
from trtllm_ct.plan.gathering import gather_modules
from trtllm_ct.plan.probe import NO_PROBE, Probe, probe_key
from trtllm_ct.plan.stored import Whole
from trtllm_ct.plan.weights import WeightReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.formats.base import StoredWeight
    from trtllm_ct.formats.sparse.pieces import StoredShapes
    from trtllm_ct.plan.models.sites import Model, Site
    from trtllm_ct.plan.stored import StoredModule, View

__all__ = ["probe_checkpoint"]

_ZERO_POINT = "weight_zero_point"
_SCALARS = ("weight_global_scale", "input_global_scale")
_SCALAR_DTYPES = frozenset({DType.BF16, DType.F16, DType.F32})
_GROUP_SCALE_DTYPES = frozenset({DType.F8_E4M3, DType.U8})

_Own = tuple["Site", "StoredModule"]


def probe_checkpoint(config: QuantizationConfig, catalog: Catalog, model: Model) -> Probe:
    """Read the values that decide a mode; `NO_PROBE` where a checkpoint has no such tensor.

    Memory: one tensor at a time. Contradictions in headers are left to the planner, which names them. Raises
    `CatalogError` when a file is gone or shorter than its header said.
    """
    shapes = _read_shapes(catalog)
    symmetric = any(group.scheme.weights is not None and group.scheme.weights.symmetric for group in config.groups)
    ends = (*_SCALARS, GROUP_INDEX, *((_ZERO_POINT,) if symmetric else ()))
    if not any(name.endswith(ends) for name in catalog.tensors):
        return replace(NO_PROBE, shapes=shapes)
    own = _own_modules(catalog, model, shapes)
    scalars = _read_scalars(own, catalog)
    reader = WeightReader(config, FaultCollector(), multimodal=model.multimodal)
    zero, trivial = _read_idle(own, reader, catalog)
    powers = _read_powers(own, scalars, catalog)
    return Probe(scalars=scalars, powers=powers, zero=zero, trivial=trivial, shapes=shapes)


def _read_shapes(catalog: Catalog) -> dict[str, tuple[int, ...]]:
    """The sizes that sparse tensors say they have: their bitmasks leave the last axis open."""
    specs = {name: tensor.spec for name, tensor in catalog.tensors.items() if name.endswith((".shape", ".bitmask"))}
    views = [Whole(name=name, spec=specs[name]) for name in shape_pieces(specs)]
    return {view.sources[0]: integers(data, view.spec.dtype) for view, data in _read(views, catalog)}


def _own_modules(catalog: Catalog, model: Model, shapes: StoredShapes) -> list[_Own]:
    """The modules of the model as the planner finds them, each with its site."""
    with suppress(PlanError), collector_paused():  # the planner raises it again
        stored = gather_modules(catalog, model, FaultCollector(), shapes)
        return [
            (site, stored[name])
            for site in model.sites(model.place(stored))
            if (name := next((name for name in site.stored_names if name in stored), None)) is not None
        ]
    return []


def _read_scalars(own: Iterable[_Own], catalog: Catalog) -> dict[str, float]:
    """The global scales of parts that share theirs with others."""
    views = [
        view
        for site, module in own
        if site.shares is not None
        for local in _SCALARS
        if (view := module.views.get(local)) is not None and _is_scalar(view)
    ]
    return {probe_key(view): number(data, view.spec.dtype) for view, data in _read(views, catalog)}


def _is_scalar(view: View) -> bool:
    return view.spec.numel == 1 and view.spec.dtype in _SCALAR_DTYPES


def _read_powers(own: Iterable[_Own], scalars: Mapping[str, float], catalog: Catalog) -> dict[str, tuple[int, int]]:
    """How far the group scales of those parts can be shifted whose global scales are powers of two apart."""
    linears: dict[str | None, list[tuple[float, StoredModule]]] = {}
    for site, module in own:
        view = module.views.get(_SCALARS[0])
        scalar = None if view is None else scalars.get(probe_key(view))
        if scalar is not None:
            linears.setdefault(site.shares, []).append((scalar, module))
    views = [
        view
        for parts in linears.values()
        if powers_of_two_apart([scalar for scalar, _ in parts])
        for _, module in parts
        if (view := module.views.get("weight_scale")) is not None and view.spec.dtype in _GROUP_SCALE_DTYPES
    ]
    return {probe_key(view): exact_powers(data) for view, data in _read(views, catalog)}


def _read_idle(own: Iterable[_Own], reader: WeightReader, catalog: Catalog) -> tuple[frozenset[str], frozenset[str]]:
    """The zero points of symmetric weights that are all zero, and the group indices that leave groups as they are."""
    zero_points: dict[View, StoredWeight] = {}
    indices: dict[View, StoredWeight] = {}
    for site, module in own:
        if not module.is_quantized or module.views.keys().isdisjoint({_ZERO_POINT, GROUP_INDEX}):
            continue
        weight = reader.read(module, site)
        if weight is not None and weight.stored.has_zero_point and weight.stored.args.symmetric:
            zero_points[module.views[_ZERO_POINT]] = weight.stored
        if weight is not None and weight.stored.group_index is not None:
            indices[module.views[weight.stored.group_index]] = weight.stored
    zero = {view for view, data in _read(zero_points, catalog) if _is_zero(view, zero_points[view], data)}
    trivial = {view for view, data in _read(indices, catalog) if _is_in_order(view, indices[view], data)}
    return frozenset(map(probe_key, zero)), frozenset(map(probe_key, trivial))


def _is_in_order(view: View, weight: StoredWeight, data: bytes) -> bool:
    return is_contiguous_index(data, view.spec.dtype, weight.group_columns or 1)


def _is_zero(view: View, weight: StoredWeight, data: bytes) -> bool:
    if weight.zero_point_packing is None:
        return is_zero(data, view.spec.dtype)
    rows, groups = weight.scale_shape
    return is_zero_packed(data, weight.zero_point_packing, (rows, groups))


def _read(views: Iterable[View], catalog: Catalog) -> Iterator[tuple[View, bytes]]:
    """The bytes of each view once, in the order of the files; of those that are one run of a stored tensor."""
    runs = {view.runs[0]: view for view in views if view.offset is not None}
    for run, data in read_runs(catalog, runs):
        yield runs[run], data
