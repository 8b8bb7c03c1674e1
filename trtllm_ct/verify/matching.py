"""Match the modules of a source with those of a converted directory, and say which tensors are compared how."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.base.errors import CheckpointError
from trtllm_ct.engine.modes import MODES_BY_ALGO
from trtllm_ct.engine.requantization import NOT_REQUANTIZED, Requantize
from trtllm_ct.verify.given_scales import GivenScales
from trtllm_ct.verify.native import NativeWeight
from trtllm_ct.verify.pairs import Pair, Stored, native_pair, plain_pair, rounded_pair
from trtllm_ct.verify.source.decoders import DECODERS, decoder_for, has_weight, is_quantized, plain_tensors
from trtllm_ct.verify.source.names import OTHER, is_expert
from trtllm_ct.verify.source.scalars import attention_of, cache_tensors, input_multipliers, kv_scales
from trtllm_ct.verify.source.schemes import Schemes
from trtllm_ct.verify.source.transforms import Rotation, rotation_of
from trtllm_ct.verify.source.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantScheme
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
    from trtllm_ct.engine.requantization import Form
    from trtllm_ct.verify.source.coded import Coded
    from trtllm_ct.verify.source.files import SourceTensor
    from trtllm_ct.verify.source.modules import Module, Modules

__all__ = ["DirectoryMatch", "Exact", "NamedPair"]

# The conversion and this package sum the same float64 products in different orders. The difference is invisible after
# rounding to a delivered dtype, except for values halfway between two numbers of that dtype.
_FOLD_UNCERTAINTY = 1e-10
_SECOND_NAME = "weight_scale_inv"
_NOT_OF_WEIGHT = frozenset({"bias", "k_scale", "v_scale", "e_score_correction_bias"})


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPair:
    """A pair with the name of the delivered tensor and its kind, see `TensorCheck`.

    `form` is what a weight was rounded to on request; its relative error has a limit then.
    """

    name: str
    kind: str
    pair: Pair
    form: Form | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """The exact rows of a source's weight.

    `coded` returns them as codes and scales, if nothing else is applied to them. `stored` is the weight as it is stored
    if nothing is computed.
    """

    shape: tuple[int, ...]
    rows: Callable[[int, int], NDArray[np.float64]]
    block: int = 1
    coded: Callable[[int, int], Coded] | None = None
    stored: Stored | None = None
    rotated: bool = False


@dataclass(slots=True, kw_only=True)
class DirectoryMatch:
    """A source and a directory converted from it.

    `tied` says whether readers of the converted directory take its table for the head. Tensors that are missing or
    don't fit are added to `faults` while `pairs` runs; `seen` are the delivered tensors that have a source, and
    `optional` the stored ones of the source that a conversion may leave out. `requantized` says which modules the
    directory was asked to round to codes.
    """

    config: QuantizationConfig
    source: Modules
    delivered: Modules
    quant_config: QuantConfig
    tied: bool
    faults: FaultCollector
    requantized: Requantize = NOT_REQUANTIZED
    optional: frozenset[str] = frozenset()
    seen: set[str] = field(default_factory=set)
    _schemes: Schemes = field(init=False)
    _inputs: Mapping[str, float] = field(init=False)
    _given: GivenScales = field(init=False)

    def __post_init__(self) -> None:
        self._schemes = Schemes(self.config, self.source.names)
        self._inputs = input_multipliers(self.source)
        self._given = GivenScales(source=self.source, asked=self.requantized)

    def pairs(self) -> Iterator[NamedPair]:
        """Yield every tensor to compare, in the order of the source."""
        for key, module in self.source.by_key.items():
            delivered = self.delivered.by_key.get(key)
            yield from self._module(module, delivered)
            values = self.source.names.values_key(key)
            if values is not None and values not in self.source.by_key and values in self.delivered.by_key:
                yield from self._module(module, self.delivered.by_key[values])
        yield from self._kv_scales()

    def exact_weight(self, module: Module) -> Exact | None:
        """Return the weight of a source module, with its online transforms applied; None after adding a fault."""
        exact = self._exact_weight(module)
        if exact is None or len(exact.shape) != 2:
            return exact
        shape = (exact.shape[0], exact.shape[1])
        return _rotated(exact, rotation_of(module, shape, self.config.transforms, self.source))

    def scheme_of(self, module: Module) -> QuantScheme | None:
        """Return the scheme of a quantized module of the source; None for a plain one, or if no group has it."""
        return self._schemes.scheme(module) if is_quantized(module.tensors) else None

    def layer_of(self, key: str, name: str) -> LayerQuantConfig | None:
        """Return the mode of a delivered module by its key and name; norms, tables and plain towers have none."""
        source = self.source.by_key.get(key)
        if source is None or key == "embed_tokens":
            return None
        if not is_quantized(source.tensors):
            weight = source.tensors.get("weight")
            if key.startswith(OTHER) or weight is None or len(weight.shape) != 2:
                return None
        return self.quant_config.layer_config(name)

    def report_surplus(self, converted: Path) -> None:
        """Add a fault for each delivered tensor without a source, and for experts under names that nobody reads."""
        for module in self.delivered.by_key.values():
            names = self.delivered.names.misspelled(module.name)
            if names is not None:
                self.faults.add(
                    where=f"{converted}: {module.name}",
                    expected=f"a projection called one of {names}, as the class of this model reads it",
                    found="another name",
                    remedy="Convert again; a reader would not find the weight.",
                )
            for local, tensor in module.tensors.items():
                name = getattr(tensor, "name", f"{module.name}.{local}")
                if name not in self.seen:
                    self.faults.add(
                        where=f"{converted}: {name}",
                        expected="only tensors that come from the source",
                        found="one without a source",
                        remedy="Convert again into an empty directory.",
                    )

    def _module(self, module: Module, delivered: Module | None) -> Iterator[NamedPair]:
        """Yield the pairs of one module: its weight, its other plain tensors, and the scale of its input."""
        rotation, exact = Rotation(), None
        if delivered is None and all(self._is_optional(module, local) for local in module.tensors):
            return
        if has_weight(module.tensors):
            exact = self._exact_weight(module)
            if exact is None:
                return
            if len(exact.shape) == 2:
                shape = (exact.shape[0], exact.shape[1])
                rotation = rotation_of(module, shape, self.config.transforms, self.source)
                exact = _rotated(exact, rotation)
        if exact is not None:
            yield from self._weight(module, delivered, exact)
        cache = cache_tensors(module)
        for local in plain_tensors(module.tensors):
            if local not in cache:
                yield from self._plain(module, delivered, local, rotation)
        yield from self._input_scale(module, delivered)

    def _exact_weight(self, module: Module) -> Exact | None:
        """Return the weight of a source module; None, after adding a fault, if nothing here can decode it."""
        if not is_quantized(module.tensors):
            stored = _stored(module, "weight")
            return Exact(shape=stored.shape, rows=stored.numbers, stored=stored)
        format_name, args = decoder_for(module.tensors), self._schemes.args(module)
        if format_name is None or args is None:
            self.faults.add(
                where=module.name,
                expected=f"a weight in one of {', '.join(DECODERS)}, and a config group for it",
                found=f"tensors {', '.join(sorted(module.tensors))}",
                remedy="The conversion of this weight is not proved: verification has no decoder of its own for it.",
            )
            return None
        decoder = DECODERS[format_name]
        weight = Weight(module=module, args=args, release=self.config.release)
        weight.shape = decoder.shape(weight)
        rows = weight.shape[0] // module.parts
        first = module.part * rows

        def coded(begin: int, end: int) -> Coded:
            return decoder.read(weight, first + begin, first + end)

        return Exact(
            shape=(rows, weight.shape[1]),
            rows=lambda begin, end: coded(begin, end).values(),
            block=decoder.block,
            coded=coded,
        )

    def _weight(self, module: Module, delivered: Module | None, exact: Exact) -> Iterator[NamedPair]:
        name = f"{delivered.name if delivered else module.name}.weight"
        if delivered is None or "weight" not in delivered.tensors:
            yield from self._absent_weight(module, name, exact)
            return
        layer = self.layer_of(module.key, delivered.name)
        if layer is not None and len(exact.shape) == 2:
            yield from self._native(module, delivered, layer, exact)
            return
        self._see(delivered, "weight")
        kind = "dequantized" if is_quantized(module.tensors) else "plain"
        yield from self._unquantized(name, kind, _stored(delivered, "weight"), exact)

    def _absent_weight(self, module: Module, name: str, exact: Exact) -> Iterator[NamedPair]:
        """A head that is not delivered must equal the delivered embeddings, which readers use in its place."""
        table = self.delivered.by_key.get("embed_tokens")
        if module.key == "lm_head" and self.tied and table is not None and "weight" in table.tensors:
            if "embed_tokens" not in self.source.by_key:
                self._see(table, "weight")
            yield from self._unquantized(name, "plain", _stored(table, "weight"), exact)
        else:
            self._report_missing(name)

    def _native(self, module: Module, delivered: Module, layer: LayerQuantConfig, exact: Exact) -> Iterator[NamedPair]:
        tensors = {local: tensor for local, tensor in delivered.tensors.items() if local not in _NOT_OF_WEIGHT}
        for local in tensors.keys() - {"input_scale"}:
            self._see(delivered, local)
        mode = MODES_BY_ALGO.get(layer.quant_algo)
        if mode is not None and mode.pre_quant_scale:
            self._check_pre_quant_scale(module, delivered)
        second = is_expert(module.key) or self.source.names.is_joined_by_class(module.key)
        alias = mode.expert_scale_alias if mode is not None and second else None
        if alias and alias not in tensors:
            self._report_missing(f"{delivered.name}.{alias}")
        if {"weight_scale", _SECOND_NAME} <= tensors.keys():
            self._check_second_name(delivered.name, tensors["weight_scale"], tensors.pop(_SECOND_NAME))
        shape = (exact.shape[0], exact.shape[1])
        native = NativeWeight(name=delivered.name, tensors=tensors, layer=layer, shape=shape)
        try:
            native.check()
        except CheckpointError as error:
            self.faults.faults.extend(error.faults)
            return
        form, name, source = self._form(module, layer), f"{delivered.name}.weight", exact.coded or exact.rows
        if form is None:
            yield NamedPair(name=name, kind="native", pair=native_pair(native, source, exact.block))
        else:
            pair = rounded_pair(native, source, exact.block, form)
            yield NamedPair(name=name, kind="requantized", pair=pair, form=form)

    def _form(self, module: Module, layer: LayerQuantConfig) -> Form | None:
        """Return what a module's weight was rounded to on request.

        None if it is in that form already, or if its mode holds other codes: those are the ones of the source.
        """
        form, args = self.requantized.form(expert=is_expert(module.key)), self._schemes.args(module)
        mode = MODES_BY_ALGO.get(layer.quant_algo)
        if form is None or args is None or mode is None:
            return None
        if (mode.element, mode.scale.dtype) != (form.element, form.scale_dtype):
            return None
        if form.weights.strategy not in mode.exact:
            return None
        same = ("num_bits", "type", "strategy", "group_size", "block_structure")
        return form if any(getattr(args, name) != getattr(form.weights, name) for name in same) else None

    def _check_pre_quant_scale(self, module: Module, delivered: Module) -> None:
        """Check that `pre_quant_scale` exists for a Linear that is not fused, and only there.

        Engines require it for a Linear that stands alone, and never read it for a fused Linear.
        """
        name = f"{delivered.name}.pre_quant_scale"
        fused = self.source.names.fused_linear(module.key) is not None
        if not fused and "pre_quant_scale" not in delivered.tensors:
            self._report_missing(name)
        if fused and "pre_quant_scale" in delivered.tensors:
            self.faults.add(
                where=name,
                expected="no such tensor, since engines don't read it in a fused Linear",
                found="one that would be lost",
                remedy="Convert again; the weights must do without it.",
            )

    def _check_second_name(self, module: str, scale: SourceTensor, second_scale: SourceTensor) -> None:
        """Check that both names of an expert's scale, one for each release of the engine, hold the same values."""
        if scale.shape != second_scale.shape or not np.array_equal(scale.whole(), second_scale.whole()):
            self.faults.add(
                where=f"{module}.{_SECOND_NAME}",
                expected="the same values as weight_scale",
                found="others",
                remedy="Convert again; an engine would read either of them.",
            )

    def _plain(self, module: Module, delivered: Module | None, local: str, rotation: Rotation) -> Iterator[NamedPair]:
        """Yield the pair of a plain tensor beside the weight, such as a bias."""
        name = f"{delivered.name if delivered else module.name}.{local}".lstrip(".")
        if delivered is None or local not in delivered.tensors:
            if not self._is_optional(module, local):
                self._report_missing(name)
            return
        self._see(delivered, local)
        stored = _stored(module, local)
        exact = Exact(shape=stored.shape, rows=stored.numbers, stored=stored)
        if local == "bias" and rotation.outputs:
            exact = Exact(
                shape=stored.shape, rows=lambda begin, end: rotation.bias(stored.numbers(begin, end)), rotated=True
            )
        yield from self._unquantized(name, "plain", _stored(delivered, local), exact)

    def _input_scale(self, module: Module, delivered: Module | None) -> Iterator[NamedPair]:
        """Yield the pair of a static scale of the input, if the delivered mode reads one that the source has."""
        layer = self.layer_of(module.key, delivered.name) if delivered else None
        mode = MODES_BY_ALGO.get(layer.quant_algo) if layer else None
        if delivered is None or mode is None:
            return
        given = self._given.gave(module.key, self.scheme_of(module), mode)
        if not given and mode.input_scale not in module.tensors:
            return
        name = f"{delivered.name}.input_scale"
        if "input_scale" not in delivered.tensors:
            self._report_missing(name)
            return
        self._see(delivered, "input_scale")
        stored = _stored(delivered, "input_scale")
        if given:
            value = self._given.value_or_fault(name, module, stored, self.faults)
            if value is not None:
                yield from self._scalar(name, stored, value)
            return
        if mode.input_scale == "input_scale":
            value = float(module.tensors["input_scale"].all_numbers().max())
        else:
            value = self._inputs[module.key]
        yield from self._scalar(name, stored, value)

    def _kv_scales(self) -> Iterator[NamedPair]:
        """Yield the pairs of the KV cache's scales, under whichever module they are delivered."""
        promised = kv_scales(self.source)
        missing = set(promised)
        for module in self.delivered.by_key.values():
            attention = attention_of(module.key)
            for letter in "kv":
                scale = promised.get((attention, letter))
                if f"{letter}_scale" in module.tensors and scale is not None:
                    missing.discard((attention, letter))
                    self._see(module, f"{letter}_scale")
                    delivered = _stored(module, f"{letter}_scale")
                    yield from self._scalar(f"{module.name}.{letter}_scale", delivered, scale.value)
        if self.quant_config.kv_cache_quant_algo is None or not self.source.names.cache_scales_are_read:
            return
        for attention, letter in missing:
            parent = next((n for n in self._attention_names(attention)), attention)
            self._report_missing(f"{parent}.{letter}_proj.{letter}_scale")

    def _attention_names(self, attention: str) -> Iterator[str]:
        """Yield the delivered name of an attention module, if any module of it is delivered."""
        for key, module in self.delivered.by_key.items():
            if key.startswith(f"{attention}."):
                yield attention_of(module.name)

    def _scalar(self, name: str, delivered: Stored, value: float) -> Iterator[NamedPair]:
        """Yield the pair of a scalar with the value that it must have."""
        exact = Exact(shape=(1,), rows=lambda _begin, _end: np.array([value]))
        yield from self._unquantized(name, "plain", delivered, exact)

    def _unquantized(self, name: str, kind: str, delivered: Stored, exact: Exact) -> Iterator[NamedPair]:
        """Yield the pair of an unquantized tensor; adds a fault for a quantized dtype or another shape."""
        scalar = prod(delivered.shape) == prod(exact.shape) == 1
        if not delivered.dtype.is_wide_float and (exact.stored is None or exact.stored.dtype is not delivered.dtype):
            fits = False
        else:
            fits = scalar or delivered.shape == exact.shape
        if not fits:
            self.faults.add(
                where=name,
                expected=f"plain float values {list(exact.shape)}, since hf_quant_config.json gives it no mode",
                found=f"torch.{delivered.dtype.torch_name} {list(delivered.shape)}",
                remedy="Convert again; configuration and weights of this directory don't belong together.",
            )
            return
        uncertainty = _FOLD_UNCERTAINTY if exact.rotated else 0.0
        pair = plain_pair(delivered, exact.stored or exact.rows, uncertainty=uncertainty, block=exact.block)
        yield NamedPair(name=name, kind=kind, pair=pair)

    def _is_optional(self, module: Module, local: str) -> bool:
        """Whether a conversion may leave out a tensor of the source."""
        return getattr(module.tensors[local], "name", "") in self.optional

    def _see(self, delivered: Module, local: str) -> None:
        """Note that a delivered tensor has a source."""
        self.seen.add(getattr(delivered.tensors[local], "name", f"{delivered.name}.{local}"))

    def _report_missing(self, name: str) -> None:
        self.faults.add(
            where=name,
            expected="a tensor made from the source",
            found="no such tensor in the converted directory",
            remedy="Convert again; the directory is not complete.",
        )


def _stored(module: Module, local: str) -> Stored:
    """Return a plain tensor of a module as it is stored."""
    return Stored(
        dtype=module.tensors[local].dtype,
        shape=module.plain_shape(local),
        rows=lambda begin, end: module.plain_rows(local, begin, end),
    )


def _rotated(exact: Exact, rotation: Rotation) -> Exact:
    """Return the weight of the plain module that equals one with transforms."""
    if not (rotation.inputs or rotation.outputs or rotation.rows):
        return exact
    return Exact(
        shape=exact.shape,
        rows=lambda begin, end: rotation.weight(exact.rows(begin, end)),
        block=max(exact.block, rotation.block),
        rotated=True,
    )
