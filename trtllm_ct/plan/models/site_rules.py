"""`SiteRules`: applies the row of a model class to the names of modules, wherever these come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_ct.engine.parallel import Cut
from trtllm_ct.plan.models.class_row import PROJECTION_NAMES, entry_of
from trtllm_ct.plan.models.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from trtllm_ct.plan.models.class_row import ClassRow, Limit

__all__ = ["SiteRules", "ends_with"]

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_DOWN = 2


@dataclass(slots=True)
class SiteRules:
    """Makes the sites of modules by the row of their class.

    Shapes are those of the weights, () if only the format of the codes shows them; `local_names` are the local names of
    the parameters beside the weight.
    """

    row: ClassRow
    _fused: Mapping[str, str] = field(init=False)
    _joined: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self._fused = {part: whole for whole, parts in self.row.fused.items() for part in parts}
        self._joined = {part: whole for whole, parts in self.row.joins.items() for part in parts}

    def table(self, name: str, shape: tuple[int, ...], local_names: tuple[str, ...] = ()) -> Site:
        """Return the site of embeddings."""
        return Site(
            module=name, class_name="Embedding", shape=shape, plain=True, locals=local_names, cut=self.row.table
        )

    def head(self, name: str, shape: tuple[int, ...], local_names: tuple[str, ...] = ()) -> Site:
        """Return the site of the head of the text model."""
        return Site(
            module=name,
            class_name="Linear",
            shape=shape,
            head=True,
            locals=local_names,
            cut=Cut.VOCABULARY,
            limit=self._limit(name),
        )

    def linear(self, name: str, shape: tuple[int, ...], local_names: tuple[str, ...] = ()) -> Site:
        """Return the site of any other Linear but a routed expert, without its number of K/V heads."""
        parent, _, leaf = name.rpartition(".")
        joined = _whole(name, self._joined)
        group = joined or _whole(name, self._fused)
        return Site(
            module=name,
            class_name="Linear",
            shape=shape,
            mode_group=group,
            # Behind the last part that a class joins there is none whose scales could be misplaced.
            fused=group is not None and group != name,
            shares=group,
            plain=ends_with(name, (*self.row.plain, self.row.router)),
            locals=local_names,
            cut=entry_of(self.row.cuts, name) or Cut.NONE,
            class_cuts=entry_of(self.row.splits, name) is not None,
            class_joins=joined is not None,
            attention=leaf in _ATTENTION or parent.rpartition(".")[2] in {"self_attn", *self.row.mixers},
            ranks_vary=ends_with(name, self.row.ranks_vary),
            limit=self._limit(name),
            early=ends_with(name, self.row.early),
        )

    def expert(
        self,
        experts: str,
        number: object,
        projection: int,
        shape: tuple[int, ...],
        local_names: tuple[str, ...] = (),
        *,
        stored: str | None = None,
    ) -> Site:
        """Return the site of a projection of a routed expert, which is delivered under the name that the class reads.

        `experts` is the name of the module of all experts, and `projection` a position in (gate, up, down). `stored` is
        the name of the projection in the files, None for the one that most writers use.
        """
        prefix = f"{experts}.{number}."
        written = stored or PROJECTION_NAMES[projection]
        leaf = self.row.projections[projection] if self.row.projections else written
        return Site(
            module=prefix + leaf,
            class_name="Linear",
            shape=shape,
            mode_group=experts,
            shares=None if projection == _DOWN else f"{prefix}gate_up",
            expert=True,
            locals=local_names,
            aliases=() if leaf == written else (prefix + written,),
            cut=Cut.ROW if projection == _DOWN else Cut.COLUMN,
            limit=self._limit(f"{experts}.{leaf}"),
        )

    def _limit(self, name: str) -> Limit | None:
        """Return the limit on the modes of a module; None without any."""
        return next((limit for limit in self.row.limits if ends_with(name, limit.paths)), None)


def _whole(name: str, wholes: Mapping[str, str]) -> str | None:
    """Return the name of the Linear that a module becomes a part of; None if it does not become one."""
    parent, whole = name.rpartition(".")[0], entry_of(wholes, name)
    return f"{parent}.{whole}" if whole and parent else None


def ends_with(name: str, paths: Iterable[str]) -> bool:
    """Whether the name of a module ends with one of these paths."""
    return any(name == path or name.endswith(f".{path}") for path in paths)
