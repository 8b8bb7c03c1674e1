"""Which modules of a directory can't be served at given parallel sizes, or on a given GPU.

A directory is planned for some sizes. At others, an engine would cut some of its blocks or groups apart; most releases
then write scales past their end, and compute with wrong ones. The rule is the one of planning (`engine/slices.py`),
applied to the modes that the modules already have. So is the rule about GPUs (`engine/kernels.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.errors import FaultCollector
from trtllm_ct.engine.holdings import slice_problem
from trtllm_ct.engine.kernels import gpu_problem
from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.plan.ranks.cuts import refuse_uneven, repeated_biases, slices_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trtllm_ct.base.dtypes import DType
    from trtllm_ct.base.errors import Fault
    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.engine.platform import Platform
    from trtllm_ct.engine.quant_config import LayerQuantConfig
    from trtllm_ct.plan.models.sites import Model, Site

__all__ = ["misread_biases", "uneven_faults", "unheld_modules", "unrunnable_modules"]


def unheld_modules(
    sites: Iterable[Site], layer_of: Callable[[str], LayerQuantConfig | None], parallel: Parallel
) -> dict[str, str]:
    """Return the modules whose mode doesn't hold the slices of these sizes, with the reason for each.

    `layer_of` gives the mode of a module by name, None for a plain one. The sizes must divide the model evenly.
    """
    unheld = {}
    for site in sites:
        layer = layer_of(site.module) if len(site.shape) > 1 else None
        problem = _problem(site, layer, parallel) if layer is not None else ""
        if problem:
            unheld[site.module] = problem
    return unheld


def unrunnable_modules(
    sites: Iterable[Site], layer_of: Callable[[str], LayerQuantConfig | None], platform: Platform, dtype: DType
) -> dict[str, str]:
    """Return the modules whose mode a release doesn't have on a GPU, or computes wrongly there, with the reasons.

    `layer_of` gives the mode of a module by name, None for a plain one. `dtype` is the model's. Empty if the SM of the
    GPU is not known.
    """
    unrunnable: dict[str, str] = {}
    for site in sites if platform.sm is not None else ():
        layer = layer_of(site.module) if len(site.shape) > 1 else None
        mode = MODES_BY_ALGO.get(layer.quant_algo) if layer is not None else None
        if mode is not None:
            bias = "bias" in site.locals
            problem = gpu_problem(mode, site.shape[1], platform, dtype=dtype, expert=site.expert, bias=bias)
            unrunnable |= {site.module: problem} if problem else {}
    return unrunnable


def misread_biases(model: Model, parallel: Parallel) -> dict[str, str]:
    """Return the paths of the biases that engines misread at these sizes, see `refuse_uneven`, with the reason."""
    reason = f"engines repeat the elements of a bias instead of its {model.kv_heads} heads"
    return {f"{path}.bias": reason for path in repeated_biases(model, parallel, parallel.tensor)}


def uneven_faults(model: Model, parallel: Parallel) -> tuple[Fault, ...]:
    """Return a fault for each size of a model that the ranks can't divide evenly, see `refuse_uneven`."""
    faults = FaultCollector()
    refuse_uneven(model, parallel, faults)
    return tuple(faults.faults)


def _problem(site: Site, layer: LayerQuantConfig, parallel: Parallel) -> str:
    """Return why the mode of a module doesn't hold the slices of these sizes; empty if it does, or is not known."""
    mode = MODES_BY_ALGO.get(layer.quant_algo)
    slices = slices_of(site, parallel, (), repeats_scales=False)
    if mode is None or slices is None:
        return ""
    rows, columns = site.shape
    problem = slice_problem(
        mode, (rows, columns), slices, group_size=layer.group_size or 1, fused=site.fused, expert=site.expert
    )
    return problem and f"{mode.algo}: {problem}"
