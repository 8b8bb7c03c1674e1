"""`compare_directories`: two checkpoints, or a checkpoint and its conversion, module by module.

Weights are decoded as `verify` decodes them, by code that shares nothing with conversion. `verify` asks whether a
conversion is what it must be; this says how far two directories are apart, so that a rounding counts too.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from math import lcm, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import CheckpointError, Fault, FaultCollector, UsageError
from trtllm_ct.base.json_form import fields_form, json_object
from trtllm_ct.base.packages import missing_packages_as_errors
from trtllm_ct.base.texts import format_bytes
from trtllm_ct.checkpoint.catalog import Catalog
from trtllm_ct.config.json_file import read_json_object
from trtllm_ct.engine.quant_config import QuantConfig
from trtllm_ct.pipeline.open import open_checkpoint
from trtllm_ct.reference.directory import read_quant_config
from trtllm_ct.verify.comparison import Comparison, compare_numbers
from trtllm_ct.verify.converted import checks_of, source_modules
from trtllm_ct.verify.engine_ranks import is_engine_directory
from trtllm_ct.verify.matching import DirectoryMatch, NamedPair
from trtllm_ct.verify.module_values import CheckpointSide, ConvertedSide, bytes_of, has_values
from trtllm_ct.verify.pairs import Pair
from trtllm_ct.verify.source.files import TensorFiles, tensors_of
from trtllm_ct.verify.source.modules import read_modules
from trtllm_ct.verify.source.names import Names, has_native_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.verify.module_values import Values
    from trtllm_ct.verify.source.modules import Modules
    from trtllm_ct.verify.verify import Started

__all__ = ["ComparedModule", "DirectoryComparison", "compare_directories"]

_MODES = "hf_quant_config.json"
_VERIFY = "`verify DIR OUT` compares every kind of converted directory with its source."


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModule:
    """One module of two directories: its scheme or mode and its bytes in each; None where it is missing.

    `error` is the largest difference of its weight and bias, relative to the largest value of its row in the first
    directory, and `differing` the number of elements that differ. Both are None for a module of one directory only, or
    of different shapes, and if no values were compared.
    """

    name: str
    first: str | None
    second: str | None
    first_bytes: int | None
    second_bytes: int | None
    error: float | None = None
    differing: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return fields_form(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryComparison:
    """Two directories, module by module; `compared` says whether values were compared, or headers only."""

    first: Path
    second: Path
    modules: tuple[ComparedModule, ...]
    compared: bool
    faults: tuple[Fault, ...] = ()

    @property
    def sums(self) -> tuple[int, int]:
        """The bytes of all modules in each directory."""
        return (
            sum(module.first_bytes or 0 for module in self.modules),
            sum(module.second_bytes or 0 for module in self.modules),
        )

    @property
    def verdict(self) -> str:
        """One sentence: how many modules are the same, how far the others are apart, and the bytes."""
        both = [module for module in self.modules if module.first is not None and module.second is not None]
        if self.compared:
            errors = [module.error for module in both if module.error is not None]
            far = [error for error in errors if error]
            worst = f", by up to {max(far):.3g} of the largest value of a row" if far else ""
            texts = [f"{len(errors) - len(far):,} of {len(both):,} modules hold the same values"]
            texts += [f"{len(far):,} differ{worst}"] if far else []
            texts += [f"{len(both) - len(errors):,} can't be compared"] if len(errors) < len(both) else []
        else:
            changed = sum(module.first != module.second for module in both)
            texts = [f"{changed:,} of {len(both):,} modules are stored in another way"]
        alone = len(self.modules) - len(both)
        texts += [f"{alone:,} are in one directory only"] if alone else []
        return f"{', '.join(texts)}; {' and '.join(map(format_bytes, self.sums))}."

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        first, second = self.sums
        return json_object(
            {
                "first": self.first,
                "second": self.second,
                "verdict": self.verdict,
                "first_bytes": first,
                "second_bytes": second,
                "modules": self.modules,
                "faults": self.faults,
            }
        )


@missing_packages_as_errors()
def compare_directories(
    first: str | Path, second: str | Path, *, values: bool = True, on_start: Started | None = None
) -> DirectoryComparison:
    """Compare two checkpoints, or a checkpoint and what was converted from it for the PyTorch backend.

    Without `values` only headers and shapes of weights are read. `on_start` is that of `verify_checkpoint`, in elements
    of the first one.
    Raises what `open_checkpoint` raises, and `UsageError` for a converted directory that is named first, and for an
    engine-build checkpoint. Weights that can't be decoded are faults of the result.
    """
    first, second = Path(first), Path(second)
    for directory, name in ((first, "the first directory"), (second, "the second directory")):
        if is_engine_directory(directory):
            expected = f"a checkpoint, or what was converted for the PyTorch backend, as {name}"
            raise UsageError(_refused(directory, expected, "an engine-build checkpoint", _VERIFY))
    if (first / _MODES).is_file():
        expected, remedy = "a checkpoint as the first directory", f"Name the checkpoint first. {_VERIFY}"
        raise UsageError(_refused(first, expected, f"{_MODES}: a converted directory", remedy))
    faults = FaultCollector()
    with _opened(first, second, faults) as sides:
        pairs = list(sides.pairs()) if values else []
        progress = on_start(sum(prod(pair.pair.shape) for pair in pairs)) if on_start else _ignore
        found: dict[str, list[Comparison]] = defaultdict(list)
        # What differs is the result here, and no fault.
        for check in checks_of(pairs, FaultCollector(), progress):
            found[check.name].append(check.comparison)
        errors = {key: reduce(Comparison.joined, comparisons) for key, comparisons in found.items()}
        modules = tuple(sides.module(key, errors.get(key)) for key in sides.keys)
    return DirectoryComparison(
        first=first, second=second, modules=modules, compared=values, faults=tuple(faults.faults)
    )


def _refused(directory: Path, expected: str, found: str, remedy: str) -> Fault:
    return Fault(where=str(directory), expected=expected, found=found, remedy=remedy)


@contextmanager
def _opened(first: Path, second: Path, faults: FaultCollector) -> Iterator[_Sides]:
    """Open both directories; the second one as a conversion of the first if it says in which modes it is."""
    checkpoint = open_checkpoint(first)
    converted = (second / _MODES).is_file()
    catalog = Catalog.from_directory(second)
    with TensorFiles(checkpoint.catalog) as files, TensorFiles(catalog) as second_files:
        one = source_modules(checkpoint, files, keeps_names=converted and has_native_names(catalog.tensors))
        if converted:
            config = read_json_object(second / "config.json")
            other = read_modules(tensors_of(second_files), Names.of(config))
            modes = read_quant_config(second / _MODES, catalog)
            side: CheckpointSide | ConvertedSide = ConvertedSide(_match(checkpoint, one, other, modes, faults))
        else:
            with_config = open_checkpoint(second)
            other = source_modules(with_config, second_files)
            side = CheckpointSide(_match(with_config, other, other, QuantConfig(), faults))
        yield _Sides(one, CheckpointSide(_match(checkpoint, one, one, QuantConfig(), faults)), other, side, faults)


def _match(
    checkpoint: Checkpoint, source: Modules, delivered: Modules, modes: QuantConfig, faults: FaultCollector
) -> DirectoryMatch:
    return DirectoryMatch(
        config=checkpoint.config, source=source, delivered=delivered, quant_config=modes, tied=False, faults=faults
    )


@dataclass(frozen=True, slots=True)
class _Sides:
    """The modules of two opened directories by what they mean, and how each of them is read."""

    one: Modules
    first: CheckpointSide
    other: Modules
    second: CheckpointSide | ConvertedSide
    faults: FaultCollector

    @property
    def keys(self) -> list[str]:
        """The modules of both that have numbers to compare, in the order of the first one."""
        both = (*self.one.by_key.items(), *self.other.by_key.items())
        return [*dict.fromkeys(key for key, module in both if has_values(module))]

    def module(self, key: str, error: Comparison | None) -> ComparedModule:
        """Return one module; `error` is the comparison of its values."""
        one, other = self.one.by_key.get(key), self.other.by_key.get(key)
        named = one or other
        return ComparedModule(
            name=named.name if named else key,
            first=self.first.scheme(one) if one else None,
            second=self.second.scheme(other) if other else None,
            first_bytes=bytes_of(one) if one else None,
            second_bytes=bytes_of(other) if other else None,
            error=error.error if error else None,
            differing=error.differing if error else None,
        )

    def pairs(self) -> Iterator[NamedPair]:
        """Yield the tensors of numbers that both have in one shape, named by the key of their module."""
        for key, module in self.one.by_key.items():
            other = self.other.by_key.get(key)
            if other is None:
                continue
            try:
                wanted, got = dict(self.first.values(module)), dict(self.second.values(other))
            except CheckpointError as error:
                self.faults.faults.extend(error.faults)
                continue
            if wanted.keys() == got.keys() and all(wanted[local].shape == got[local].shape for local in wanted):
                for local, want in wanted.items():
                    yield NamedPair(name=key, kind="both", pair=_pair(want, got[local]))


def _pair(want: Values, got: Values) -> Pair:
    """Return the pair of a tensor in both directories; every difference counts, and NaN equals NaN."""

    def compare(begin: int, end: int) -> Comparison:
        return compare_numbers(got.rows(begin, end), want.rows(begin, end))

    return Pair(shape=want.shape, compare=compare, block=lcm(want.block, got.block))


def _ignore(nbytes: int) -> None:
    """Ignore progress; used when the caller passes no `on_start`."""
