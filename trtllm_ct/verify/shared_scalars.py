"""Check the scalars that the parts of a fused Linear share in a converted directory.

Engines fuse q/k/v, and gate and up, into one Linear each, and assert that the scalars of all parts are equal.
The comparison of the weights already proves that they have the right values whichever scalar is used. This file checks
that all parts agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.engine.modes import MODES_BY_ALGO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.verify.matching import DirectoryMatch
    from trtllm_ct.verify.source.modules import Module

__all__ = ["check_fused_scalars"]


def check_fused_scalars(match: DirectoryMatch, faults: FaultCollector) -> None:
    """Add a fault for each scalar of a converted part that differs from the scalar of the first part of its Linear.

    Skips every Linear with a part that already has a fault: the differing scalar may only follow from it.
    """
    fault_places = [fault.where for fault in faults.faults]
    linears: dict[tuple[str, tuple[str, ...]], list[Module]] = {}
    for key in match.source.by_key:
        module = match.delivered.by_key.get(key)
        layer = match.layer_of(key, module.name) if module is not None else None
        mode = MODES_BY_ALGO.get(layer.quant_algo) if layer is not None else None
        if module is not None and mode is not None and mode.shared_scalars:
            linears.setdefault((match.source.names.sharing_scalars(key), mode.shared_scalars), []).append(module)
    for (_, scalars), modules in linears.items():
        if any(place.startswith(module.name) for place in fault_places for module in modules):
            continue
        for local in scalars:
            values = {
                module.name: float(module.tensors[local].all_numbers().flat[0])
                for module in modules
                if local in module.tensors
            }
            _check_equal(values, local, faults)


def _check_equal(scalars: Mapping[str, float], local: str, faults: FaultCollector) -> None:
    """Add a fault for each scalar, by module name, that differs from the first."""
    first = next(iter(scalars), "")
    for name, value in scalars.items():
        # Releases of early 2026 assert exact equality.
        if value != scalars[first]:
            faults.add(
                where=f"{name}.{local}",
                expected=f"{scalars[first]:.9g}, as {first} has it: the engine makes one Linear of both",
                found=f"{value:.9g}",
                remedy="Convert again; the engine would refuse the weights, or take one of the two for both.",
            )
