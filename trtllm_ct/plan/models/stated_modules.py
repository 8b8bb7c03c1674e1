"""The modules that a model must have by its config.json, with their sizes: a check of the modules in the files.

The row of a class gives their names (`Leaves`) and config.json gives their number and sizes. So a checkpoint that lacks
a module, or whose weights have other sizes, is refused before any weight is read, whatever its other layers have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.plan.models.class_row import PROJECTION_NAMES, entry_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trtllm_ct.plan.models.class_row import ClassRow, Leaves

__all__ = ["Stated", "StatedModules"]


class Stated(NamedTuple):
    """A module that a model must have.

    `shape` is the shape of its weight, which is a vector in a norm and a matrix in any other module. `locals` are the
    local names of the parameters beside the weight. `aliases` are other names under which writers have stored it.
    """

    shape: tuple[int, ...]
    locals: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Return the names that the module called `name` may have in the files, as `Site.stored_names` does."""
        return (name, f"{name}.base_layer", *self.aliases)

    def behind(self, prefix: str) -> Stated:
        """Return the same module with its aliases behind a prefix."""
        return self._replace(aliases=tuple(prefix + alias for alias in self.aliases))


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedModules:
    """What config.json says about the modules of a model, for classes whose row has the modules of a layer.

    `leaves` are these modules. `sizes` are those of `sizes_of`. `biases` are the keys of config.json that give Linears
    a bias, and `always`. `dense_layers` are the numbers of the layers without routed experts.
    """

    row: ClassRow
    leaves: Leaves
    sizes: Mapping[str, int]
    biases: frozenset[str] = frozenset()
    dense_layers: frozenset[int] = frozenset()

    def parts(self, place: tuple[str, str], *, tied: bool) -> Iterator[tuple[str, Mapping[str, Stated]]]:
        """Yield prefixes, and the modules behind each of them by the rest of their names, in the order of the model.

        `place` is the prefix of the text model's body and the name of its head; a tied head is no module. Layers of one
        kind have the same mapping.
        """
        body, head = place
        hidden = self.sizes["hidden"]
        table = (self.sizes["vocabulary"], hidden)
        # Some writers store the weight of a tied head only under the name of the head.
        yield "", {f"{body}embed_tokens": Stated(table, aliases=(head,) if tied else ())}
        dense, sparse = self._dense(), self._sparse()
        for layer in range(self.sizes["layers"]):
            yield f"{body}layers.{layer}.", sparse if self._has_experts(layer) else dense
        yield "", {f"{body}norm": Stated((hidden,))}
        if not tied:
            yield "", {head: Stated(table)}

    def modules(self, place: tuple[str, str], *, tied: bool) -> Iterator[tuple[str, Stated]]:
        """Yield the full name of every module, and what is stated about it; the arguments are those of `parts`."""
        for prefix, modules in self.parts(place, tied=tied):
            for path, module in modules.items():
                yield prefix + path, module.behind(prefix) if module.aliases else module

    def _has_experts(self, layer: int) -> bool:
        return bool(self.row.router) and layer not in self.dense_layers

    def _dense(self) -> dict[str, Stated]:
        """Return the modules of a layer without routed experts, by their paths in the layer."""
        return self._attention() | self._linears(*self.leaves.mlp)

    def _sparse(self) -> dict[str, Stated]:
        """Return the modules of a layer with routed experts, by their paths in the layer; empty if there is none."""
        if not self.row.router:
            return {}
        modules = self._attention() | self._linears(self.row.router, *self.leaves.shared)
        shapes = [self._shape(f"experts.{name}") for name in PROJECTION_NAMES]
        names = self.row.projections or PROJECTION_NAMES
        for number in range(self.sizes["experts"]):
            prefix = f"{self.row.experts}.{number}."
            for name, written, shape in zip(names, PROJECTION_NAMES, shapes, strict=True):
                modules[prefix + name] = Stated(shape, aliases=() if name == written else (prefix + written,))
        return modules

    def _attention(self) -> dict[str, Stated]:
        """Return all norms and the Linears of attention in a layer, by their paths in the layer."""
        norms = {path: Stated(self._shape(path)) for path in self.leaves.norms}
        return norms | self._linears(*self.leaves.attention)

    def _linears(self, *paths: str) -> dict[str, Stated]:
        """Return Linears by their paths in a layer."""
        return {path: Stated(self._shape(path), self._locals(path)) for path in paths}

    def _locals(self, path: str) -> tuple[str, ...]:
        """Return the local names of the parameters of a Linear beside its weight."""
        bias = ("bias",) if entry_of(self.row.biases, path) in self.biases else ()
        return bias + (entry_of(self.row.extras, path) or ())

    def _shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the weight of a module by its path in a layer."""
        names = entry_of(self.row.shapes, path)
        if names is None:
            raise AssertionError(f"no row has a shape for {path}")
        return tuple(self.sizes[name] for name in names)
