"""Compare an engine-build checkpoint with its source: every part of every rank, and every tensor of their files.

The source is read by `source/`, and the files of the ranks by `engine_ranks.py`; neither a plan nor its deliveries take
part. The changes that the format makes by design are made here too before values are compared: zeros and scales are
rounded to the model's dtype, and q, k and v in FP8 are requantized to the largest of their scales.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.schemes import TensorSpec
from trtllm_ct.engine.quant_config import QuantConfig
from trtllm_ct.verify.comparison import Comparison, compare_native, compare_rounded
from trtllm_ct.verify.converted import checks_of, source_modules
from trtllm_ct.verify.engine_inputs import InputModes
from trtllm_ct.verify.engine_ranks import EngineRanks
from trtllm_ct.verify.engine_shapes import SCALAR, wanted_tensors
from trtllm_ct.verify.engine_statements import compare_statements
from trtllm_ct.verify.matching import DirectoryMatch, NamedPair
from trtllm_ct.verify.pairs import Pair
from trtllm_ct.verify.source.decoders import has_weight, is_quantized
from trtllm_ct.verify.source.files import TensorFiles
from trtllm_ct.verify.source.modules import Modules
from trtllm_ct.verify.source.names import OTHER
from trtllm_ct.verify.source.numbers import E4M3, look_up
from trtllm_ct.verify.source.rounding import rounded
from trtllm_ct.verify.source.scalars import kv_scales
from trtllm_ct.verify.statements import cache_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.verify.converted import TensorCheck
    from trtllm_ct.verify.engine_ranks import Located
    from trtllm_ct.verify.matching import Exact
    from trtllm_ct.verify.source.coded import Coded
    from trtllm_ct.verify.source.modules import Module

__all__ = ["compare_engine_directory"]

_ONES = ("prequant_scaling_factor", "smoother", "scale_to_int")
_BIASES = {"attn_bias": "attention.qkv", "mlp_bias": "mlp.fc"}
_QKV = ("q_proj", "k_proj", "v_proj")
_ONE_TABLE = (("lm_head", "embed_tokens"), ("embed_tokens", "lm_head"))
"""A table that is both may be stored under either name; the files have it under both."""
_FUSED = tuple(f"self_attn.{leaf}" for leaf in _QKV)
_SCALED_BY_DTYPE = frozenset({"W4A16_AWQ", "W4A16_GPTQ", "W8A16", "W8A16_GPTQ"})
"""Modes whose scales have the model's dtype, in the file or after it is loaded."""
_BIAS_ON_FIRST_RANK = frozenset({"W4A16_GPTQ", "W8A16_GPTQ"})
"""Modes whose kernels add the bias before the ranks are added up, and whose files the loader doesn't change."""


def compare_engine_directory(
    checkpoint: Checkpoint, converted: Path, faults: FaultCollector, progress: Callable[[int], None]
) -> tuple[TensorCheck, ...]:
    """Compare every tensor of an engine-build checkpoint with the source, on all cores.

    Tensors that differ, are missing or have no source are added to `faults`; `progress` is that of `checks_of`. Those
    of an engine of other sizes are not compared, because its parts are in other places. Raises `CheckpointError` when a
    directory can't be read.
    """
    with TensorFiles(checkpoint.catalog) as files, EngineRanks(converted) as ranks:
        source = source_modules(checkpoint, files)
        nothing = Modules(names=source.names, by_key={}, matrices={})
        match = DirectoryMatch(
            config=checkpoint.config,
            source=source,
            delivered=nothing,
            quant_config=QuantConfig(),
            tied=False,
            faults=faults,
        )
        engine = _EngineMatch(source=source, match=match, ranks=ranks, faults=faults)
        tied = _is_tied(checkpoint, source)
        if not compare_statements(checkpoint.hf_config, ranks, tied=tied, faults=faults):
            return ()
        checks = tuple(checks_of(engine.pairs(), faults, progress))
        engine.inputs.report()
        engine.report_surplus()
        engine.compare_biases()
    return checks


def _is_tied(checkpoint: Checkpoint, source: Modules) -> bool:
    """Whether the head is the embedding: config.json says so, and no other head is stored."""
    both = {"lm_head", "embed_tokens"} <= source.by_key.keys()
    return checkpoint.hf_config.get("tie_word_embeddings") is True and (not both or checkpoint.probe.head_is_table)


@dataclass(slots=True, kw_only=True)
class _EngineMatch:
    """Matches the modules of a source with the parts of them that ranks have."""

    source: Modules
    match: DirectoryMatch
    ranks: EngineRanks
    faults: FaultCollector
    inputs: InputModes = field(init=False)
    _exact: dict[str, Exact | None] = field(init=False, default_factory=dict)
    _reported: set[tuple[int, str]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.inputs = InputModes(self.faults)

    def pairs(self) -> Iterator[NamedPair]:
        """Yield every tensor to compare, in the order of the source."""
        for key, module in self.source.by_key.items():
            if not key.startswith(OTHER) and has_weight(module.tensors):
                yield from self._module(key, module)
        for key, other in _ONE_TABLE:
            if key not in self.source.by_key and other in self.source.by_key:
                yield from self._module(key, self.source.by_key[other])
        yield from self._cache_scales()

    def report_surplus(self) -> None:
        """Add a fault for each tensor that no module of the source explains."""
        for rank, name in self.ranks.unseen():
            self._fault(rank, name, "only tensors that come from the source", "one without a source")

    def compare_biases(self) -> None:
        """Add a fault for each key of config.json that doesn't say which Linears have a bias in the files."""
        for key, name in _BIASES.items():
            stated, stored = self.ranks.config.get(key), self.ranks.has_bias(name)
            if stated is not stored:
                self.faults.add(
                    where=f"config.json: {key}",
                    expected=f"{stored}, as the files have it",
                    found=str(stated),
                    remedy="Convert again; an engine would leave biases out, or look for some that are not there.",
                )

    def _module(self, key: str, module: Module) -> Iterator[NamedPair]:
        """Yield the pairs of one module on all ranks: weight, bias, and the scale of its input."""
        exact = self._exact_of(key, module)
        if exact is None:
            return
        parts = self.ranks.parts(key, exact.shape[0])
        if parts is None:
            return
        scheme = self.match.scheme_of(module)
        inputs = scheme.input_activations if scheme is not None else None
        for index, part in enumerate(parts):
            width = self._width(exact, part, len(parts))
            wanted = wanted_tensors(self.ranks, part, width, bias="bias" in module.tensors)
            if not self._has(part, wanted):
                continue
            yield self._weight(key, module, part, exact, (index, len(parts)))
            yield from self._padding(part)
            yield from (self._ones(part, local) for local in _ONES if local in wanted)
            if "bias" in wanted:
                yield self._bias(module, part)
            same = self.inputs.compare(part, self.ranks.algo(part.name), inputs)
            if same and "activation_scaling_factor" in wanted:
                members = [key.rpartition(".")[0] + f".{leaf}" for leaf in _QKV] if key.endswith(_FUSED) else [key]
                yield self._scalar(part, "activation_scaling_factor", self._input_scale(members))

    @staticmethod
    def _width(exact: Exact, part: Located, count: int) -> int | None:
        """Return the columns of a module that a rank has, None for a vector."""
        if len(exact.shape) == 1:
            return None
        return exact.shape[1] // count if part.columns else exact.shape[1]

    def _has(self, part: Located, wanted: Mapping[str, TensorSpec]) -> bool:
        """Whether the engine's module has all tensors in dtype and shape; adds a fault for each that differs, once."""
        good = True
        for local, spec in wanted.items():
            name, tensor = f"{part.name}.{local}", self.ranks.whole(part, local)
            if tensor is not None and (tensor.dtype, tensor.shape) == (spec.dtype, spec.shape):
                continue
            good = False
            if (part.rank, name) not in self._reported:
                self._reported.add((part.rank, name))
                found = str(TensorSpec(tensor.dtype, tensor.shape)) if tensor is not None else "no such tensor"
                self._fault(part.rank, name, f"{spec}, made from the source", found)
        return good

    def _exact_of(self, key: str, module: Module) -> Exact | None:
        """Return the exact weight of a module, which is decoded once for all ranks."""
        if key not in self._exact:
            self._exact[key] = self.match.exact_weight(module)
        return self._exact[key]

    def _weight(self, key: str, module: Module, part: Located, exact: Exact, place: tuple[int, int]) -> NamedPair:
        """Return the pair of the part of a weight that one rank has."""
        algo, (index, count) = self.ranks.algo(part.name), place
        dtype = self.ranks.get(part, "weight").dtype
        width = self._width(exact, part, count) or 1
        columns = slice(index * width, (index + 1) * width) if part.columns else slice(None)

        def compare(begin: int, end: int) -> Comparison:
            got = self.ranks.weight_rows(part, begin, end)
            want = self._want(key, exact, algo, part.begin + begin, part.begin + end)
            want = want.reshape(got.shape) if want.ndim == 1 else want[:, columns]
            return compare_rounded(got, want, dtype) if algo is None else compare_native(got, want)

        kind = "plain" if not is_quantized(module.tensors) else "dequantized" if algo is None else "native"
        shape = (part.rows, width) if len(exact.shape) > 1 else (part.rows,)
        pair = Pair(shape=shape, compare=compare, block=exact.block)
        return NamedPair(name=self._name(part, "weight"), kind=kind, pair=pair)

    def _want(self, key: str, exact: Exact, algo: str | None, begin: int, end: int) -> NDArray[np.float64]:
        """Return rows of the source with the changes that the format makes by design."""
        if exact.coded is None or algo is None:
            return exact.rows(begin, end)
        if algo == "FP8" and key.endswith(_FUSED):
            return self._requantized(key, exact.coded(begin, end))
        if algo not in _SCALED_BY_DTYPE:
            return exact.rows(begin, end)
        coded = exact.coded(begin, end)
        scale = rounded(coded.scale, self.ranks.dtype)
        if coded.zero is None:
            return replace(coded, scale=scale).values()
        offset = rounded(-(coded.zero * coded.scale), self.ranks.dtype)
        return replace(coded, scale=scale, zero=None, offset=offset).values()

    def _requantized(self, key: str, coded: Coded) -> NDArray[np.float64]:
        """Return rows of q, k or v under the largest of their scales, rounded in float32 and to E4M3."""
        scales = [self._tensor_scale(f"{key.rpartition('.')[0]}.{leaf}") for leaf in _QKV]
        own, largest = np.float32(coded.scale.flat[0]), np.float32(max(scales))
        if own == largest:
            return coded.values()
        numbers = look_up(coded.codes, E4M3).astype(np.float32) * own / largest
        return rounded(numbers.astype(np.float64), DType.F8_E4M3) * float(largest)

    def _tensor_scale(self, key: str) -> float:
        """Return the one scale of a weight; 0 for a plain one."""
        scale = self.source.by_key[key].tensors.get("weight_scale")
        return float(scale.all_numbers().max()) if scale is not None else 0.0

    def _input_scale(self, keys: list[str]) -> float:
        """Return the largest multiplier of the inputs of modules; 0 if none has one."""
        scales = [0.0]
        for key in keys:
            tensors = self.source.by_key[key].tensors
            if "input_global_scale" in tensors:
                scales.append(1 / float(tensors["input_global_scale"].all_numbers().min()))
            elif "input_scale" in tensors:
                scales.append(float(tensors["input_scale"].all_numbers().max()))
        return max(scales)

    def _bias(self, module: Module, part: Located) -> NamedPair:
        """Return the pair of the part of a bias that one rank has; ranks that divide columns have all of it."""
        bias = self.ranks.get(part, "bias")
        want = module.tensors["bias"].all_numbers()[part.begin : part.begin + part.rows]
        if part.columns and part.rank % self.ranks.tensor and self.ranks.algo(part.name) in _BIAS_ON_FIRST_RANK:
            want = np.zeros_like(want)
        got = bias.all_numbers()[part.first : part.first + part.rows]
        return self._vector(part, "bias", got, want, bias.dtype)

    def _ones(self, part: Located, local: str) -> NamedPair:
        """Return the pair of a factor that compressed-tensors has folded into other weights."""
        tensor = self.ranks.get(part, local)
        got = tensor.all_numbers().flatten()
        return self._vector(part, local, got, np.ones_like(got), tensor.dtype)

    def _padding(self, part: Located) -> Iterator[NamedPair]:
        """Yield the pair of the padding after the rows of a head, which must be zero."""
        if part.name == "lm_head" and part.rows < part.total:
            rows = self.ranks.get(part, "weight").numbers(part.rows, part.total)
            yield self._vector(part, "weight", rows.flatten(), np.zeros(rows.size), DType.F32)

    def _cache_scales(self) -> Iterator[NamedPair]:
        """Yield the pairs of the KV cache's scales: the larger one of keys and values, on every rank of a stage."""
        stated = self.ranks.cache
        wanted = cache_mode(self.match.config, ("FP8", "INT8"))
        if stated != wanted:
            self.faults.add(
                where="config.json: kv_cache_quant_algo",
                expected=f"{wanted or 'none'}, by the configuration of the source",
                found=stated or "none",
                remedy="Convert again; an engine would have another KV cache than the one that was calibrated.",
            )
        if stated is None:
            return
        largest: dict[str, float] = {}
        for (attention, _), scale in kv_scales(self.source).items():
            largest[attention] = max(scale.value, largest.get(attention, 0.0))
        for attention, value in largest.items():
            for part in self.ranks.parts(f"{attention}.o_proj", 1) or ():
                holder = replace(part, name=part.name.removesuffix(".dense"))
                if self._has(holder, {"kv_cache_scaling_factor": SCALAR}):
                    yield self._scalar(holder, "kv_cache_scaling_factor", value)

    def _scalar(self, part: Located, local: str, value: float) -> NamedPair:
        """Return the pair of a scalar."""
        got = self.ranks.get(part, local).all_numbers().flatten()
        return self._vector(part, local, got, np.full(got.shape, value), DType.F32)

    def _vector(
        self, part: Located, local: str, got: NDArray[np.float64], want: NDArray[np.float64], dtype: DType
    ) -> NamedPair:
        """Return the pair of a small tensor that is compared at once."""
        compare = compare_rounded(got, want, dtype)
        pair = Pair(shape=got.shape, compare=lambda _begin, _end: compare)
        return NamedPair(name=self._name(part, local), kind="plain", pair=pair)

    def _name(self, part: Located, local: str) -> str:
        return f"rank{part.rank}.safetensors: {part.name}.{local}"

    def _fault(self, rank: int, name: str, expected: str, found: str) -> None:
        self.faults.add(
            where=f"rank{rank}.safetensors: {name}",
            expected=expected,
            found=found,
            remedy="Convert again into an empty directory.",
        )
