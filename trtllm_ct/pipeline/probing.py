"""`probe_checkpoint`: reads the few stored values that decide a mode, before a checkpoint is planned.

| tensor                                      | read for                                    | decides                 |
|---------------------------------------------|---------------------------------------------|-------------------------|
| `weight_global_scale`, `input_global_scale` | parts of a fused Linear                     | which scalar they share |
| `weight_scale` of NVFP4                     | parts whose scalars are powers of two apart | which shifts are exact  |
| `weight_zero_point`                         | weights that their scheme calls symmetric   | whether it is all zero  |
| `weight_g_idx`                              | weights with several groups                 | whether to reorder      |
| `shape`                                     | tensors that are stored sparse              | size of the last axis   |
| head and embeddings                         | a stored head that config.json ties         | whether it is delivered |

One pass over the tensor names finds out if there is anything to read; in most checkpoints there is nothing. Bytes are
read at the positions that the headers give, and neither torch nor numpy is imported. Values are not validated here: a
NaN is kept, and refused when the tensor is loaded.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from trtllm_ct.base.collector import collector_paused
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import FaultCollector, PlanError
from trtllm_ct.checkpoint.runs import read_runs
from trtllm_ct.formats import WEIGHT_TENSORS, ZERO_POINTS, Axis
from trtllm_ct.formats.group_index import GROUP_INDEX
from trtllm_ct.formats.sparse.pieces import shape_pieces
from trtllm_ct.layouts.e4m3 import exact_powers
from trtllm_ct.layouts.raw_bytes import is_contiguous_index, is_zero, is_zero_packed, read_integers, read_scalar
from trtllm_ct.pipeline.head_probe import head_equals_table, sampled_head
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

__all__ = ["probe_checkpoint", "unread_values"]

_INPUT_SCALAR = "input_global_scale"
_SCALARS = (*(name for name, axes in WEIGHT_TENSORS.items() if Axis.SCALAR in axes), _INPUT_SCALAR)
"""Global scales: of weights in any format, and of inputs."""

_SCALAR_DTYPES = frozenset({DType.BF16, DType.F16, DType.F32})
_GROUP_SCALE_DTYPES = frozenset({DType.F8_E4M3, DType.U8})

_SiteModule = tuple["Site", "StoredModule"]


def probe_checkpoint(config: QuantizationConfig, catalog: Catalog, model: Model) -> Probe:
    """Read the values that decide a mode; returns `NO_PROBE` if a checkpoint has no such tensor.

    Memory: one tensor at a time. Contradictions in headers are ignored here; the planner reports them. Raises
    `CatalogError` when a file is missing or shorter than its header says.
    """
    shapes = _read_shapes(catalog)
    symmetric = any(group.scheme.weights is not None and group.scheme.weights.symmetric for group in config.groups)
    suffixes = (*_SCALARS, GROUP_INDEX, *(ZERO_POINTS if symmetric else ()))
    has_scalars = any(name.endswith(suffixes) for name in catalog.tensors)
    if not has_scalars and model.tied is False:
        return replace(NO_PROBE, shapes=shapes)
    stored = _stored_modules(catalog, model, shapes)
    model = model.in_checkpoint(stored)
    head_is_table = head_equals_table(model, stored, catalog)
    if not has_scalars:
        return replace(NO_PROBE, shapes=shapes, head_is_table=head_is_table)
    modules = _model_modules(stored, model)
    scalars = _read_scalars(modules, catalog)
    reader = WeightReader(config, FaultCollector(), multimodal=model.multimodal)
    zero, trivial = _read_idle(modules, reader, catalog)
    powers = _read_powers(modules, scalars, catalog)
    return Probe(scalars=scalars, powers=powers, zero=zero, trivial=trivial, shapes=shapes, head_is_table=head_is_table)


def unread_values(catalog: Catalog, model: Model, probe: Probe) -> tuple[str, ...]:
    """Return warnings about values in `probe` of which only samples were read, as the files are far away."""
    if catalog.source.weights_folder is not None or not probe.head_is_table:
        return ()
    stored = _stored_modules(catalog, model, probe.shapes)
    return sampled_head(model.in_checkpoint(stored), stored, catalog)


def _read_shapes(catalog: Catalog) -> dict[str, tuple[int, ...]]:
    """Return the numbers in the `shape` pieces of sparse tensors; a bitmask doesn't determine the last axis."""
    specs = {name: tensor.spec for name, tensor in catalog.tensors.items() if name.endswith((".shape", ".bitmask"))}
    views = [Whole(name=name, spec=specs[name]) for name in shape_pieces(specs)]
    return {view.sources[0]: read_integers(data, view.spec.dtype) for view, data in _read(views, catalog)}


def _stored_modules(catalog: Catalog, model: Model, shapes: StoredShapes) -> dict[str, StoredModule]:
    """Return the stored modules by name, as the planner gathers them."""
    with suppress(PlanError), collector_paused():  # The planner will raise the same error.
        return gather_modules(catalog, model, FaultCollector(), shapes)
    return {}


def _model_modules(stored: Mapping[str, StoredModule], model: Model) -> list[_SiteModule]:
    """Return the stored modules of the model, as the planner finds them, each with its site."""
    return [
        (site, stored[name])
        for site in model.sites(model.place(stored))
        if (name := next((name for name in site.stored_names if name in stored), None)) is not None
    ]


def _read_scalars(modules: Iterable[_SiteModule], catalog: Catalog) -> dict[str, float]:
    """Return the global scales of modules that must share them with other parts of a fused Linear."""
    views = [
        view
        for site, module in modules
        if site.shares is not None
        for local in _SCALARS
        if (view := module.views.get(local)) is not None and _is_scalar(view)
    ]
    return {probe_key(view): read_scalar(data, view.spec.dtype) for view, data in _read(views, catalog)}


def _is_scalar(view: View) -> bool:
    """Whether a tensor has one element of a wide float dtype."""
    return view.spec.numel == 1 and view.spec.dtype in _SCALAR_DTYPES


def _read_powers(
    modules: Iterable[_SiteModule], scalars: Mapping[str, float], catalog: Catalog
) -> dict[str, tuple[int, int]]:
    """Return by which powers of two group scales can be multiplied exactly, as (least, greatest).

    They are read for the parts of a fused Linear whose global scales are powers of two apart.
    """
    linears: dict[str | None, list[tuple[float, StoredModule]]] = {}
    for site, module in modules:
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


def _read_idle(
    modules: Iterable[_SiteModule], reader: WeightReader, catalog: Catalog
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the keys of zero points that are all zero, and of group indices that keep groups contiguous.

    Zero points are read only for weights that their scheme calls symmetric.
    """
    zero_points: dict[View, StoredWeight] = {}
    indices: dict[View, StoredWeight] = {}
    for site, module in modules:
        if not module.is_quantized or module.views.keys().isdisjoint({*ZERO_POINTS, GROUP_INDEX}):
            continue
        weight = reader.read(module, site)
        if weight is not None and weight.stored.zero_point is not None and weight.stored.args.symmetric:
            zero_points[module.views[weight.stored.zero_point]] = weight.stored
        if weight is not None and weight.stored.group_index is not None:
            indices[module.views[weight.stored.group_index]] = weight.stored
    zero = {view for view, data in _read(zero_points, catalog) if _is_zero(view, zero_points[view], data)}
    trivial = {view for view, data in _read(indices, catalog) if _is_contiguous(view, indices[view], data)}
    return frozenset(map(probe_key, zero)), frozenset(map(probe_key, trivial))


def _is_contiguous(view: View, weight: StoredWeight, data: bytes) -> bool:
    """Whether a group index gives contiguous groups; `data` are its bytes."""
    return is_contiguous_index(data, view.spec.dtype, weight.group_columns or 1)


def _is_zero(view: View, weight: StoredWeight, data: bytes) -> bool:
    """Whether all zero points are zero, packed or not; `data` are their bytes."""
    if weight.zero_point_packing is None:
        return is_zero(data, view.spec.dtype)
    rows, groups = weight.scale_shape
    return is_zero_packed(data, weight.zero_point_packing, (rows, groups))


def _read(views: Iterable[View], catalog: Catalog) -> Iterator[tuple[View, bytes]]:
    """Yield each view and its bytes, in the order of the files; skips views that are no run of a stored tensor."""
    runs = {view.runs[0]: view for view in views if view.offset is not None}
    for run, data in read_runs(catalog, runs):
        yield runs[run], data
