"""Numbers that are counted to, compared with what the files hold, before anything counts to them.

Every layer has a tensor of its own, and every routed expert a tensor or an entry of one. So config.json can't state
more layers or experts than the headers show.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trtllm_ct.base.errors import CatalogError, ConfigError, FaultCollector
from trtllm_ct.checkpoint.header import format_names

if TYPE_CHECKING:
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.plan.models.sites import Model

__all__ = ["check_counts"]

_DIGITS = bytes.maketrans(b"0123456789", b"0000000000")
_LONG_NUMBER = b".0000000"
_HUGE_NUMBER = re.compile(r"(?:^|\.)\d{7,}(?:\.|$)")
_MOST_EXPERTS_IN_ALL = 500_000
"""The most routed experts in all layers together; Kimi-K2 has 23,424."""


def check_counts(model: Model, catalog: Catalog) -> None:
    """Raise an error if a model has more layers or experts than its files can hold, or numbers that are no count.

    Raises `ConfigError` for counts in config.json, and `CatalogError` for numbers of 10^7 and more in names of tensors.
    """
    # One search in all names: a search in each takes as long as reading a header, and one for a pattern twice as long.
    names = ("." + "\n.".join(catalog.tensors)).encode("utf-8", "surrogatepass")
    suspected = _LONG_NUMBER in names.translate(_DIGITS)
    numbered = [name for name in catalog.tensors if _HUGE_NUMBER.search(name)] if suspected else []
    faults = FaultCollector()
    if numbered:
        found = f"numbers of seven or more digits in {len(numbered)}: {format_names(numbered)}"
        remedy = "Take the files from where the checkpoint was published: no model has so many layers or experts."
        faults.add(where="names of tensors", expected="numbers of layers and experts", found=found, remedy=remedy)
    faults.raise_if_any(CatalogError)
    _check_stated(model, catalog, faults)
    faults.raise_if_any(ConfigError)


def _check_stated(model: Model, catalog: Catalog, faults: FaultCollector) -> None:
    remedy = "Take config.json and the weights from one source."
    count = len(catalog.tensors)
    if model.layers > count:
        expected = f"at most as many layers as the files have tensors, {count}"
        where = "config.json: num_hidden_layers"
        faults.add(where=where, expected=expected, found=str(model.layers), remedy=remedy)
    experts = model.sizes.get("experts", 0)
    if experts > count and experts > (entries := _most_entries(catalog)):
        expected = f"at most as many experts as the files have tensors or entries in one, {max(count, entries)}"
        faults.add(where="config.json: number of experts", expected=expected, found=str(experts), remedy=remedy)
    elif experts * model.layers > _MOST_EXPERTS_IN_ALL:
        expected = f"at most {_MOST_EXPERTS_IN_ALL} experts in all layers"
        found = f"{experts} in each of {model.layers} layers"
        faults.add(where="config.json: number of experts", expected=expected, found=found, remedy=remedy)


def _most_entries(catalog: Catalog) -> int:
    """Return the length of the longest axis of all tensors."""
    return max((max(tensor.spec.shape, default=0) for tensor in catalog.tensors.values()), default=0)
