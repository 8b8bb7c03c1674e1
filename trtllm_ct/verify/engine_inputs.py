"""How an engine quantizes the inputs of its Linears, against the scheme of the source.

The weights alone don't show it: several algorithms have the same codes. Sources: TensorRT-LLM `quantization/layers.py`
and `quantization/quantize.py` (89fd9b74).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from trtllm_ct.base.schemes import NumberType, Strategy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.verify.engine_ranks import Located

__all__ = ["InputModes"]


class _Inputs(NamedTuple):
    """The number of an input, what has a scale of its own, and whether the scale is computed from the input."""

    type: NumberType
    bits: int
    strategies: frozenset[Strategy]
    dynamic: bool | str


_TENSOR, _TOKEN = frozenset({Strategy.TENSOR}), frozenset({Strategy.TOKEN})
_GROUP = frozenset({Strategy.GROUP, Strategy.TENSOR_GROUP})
_INPUTS: Mapping[str, _Inputs | None] = {
    "W4A16_AWQ": None,
    "W4A16_GPTQ": None,
    "W8A16": None,
    "W8A16_GPTQ": None,
    "FP8": _Inputs(NumberType.FLOAT, 8, _TENSOR, dynamic=False),
    "FP8_PER_CHANNEL_PER_TOKEN": _Inputs(NumberType.FLOAT, 8, _TOKEN, dynamic=True),
    "W8A8_SQ_PER_CHANNEL": _Inputs(NumberType.INT, 8, _TENSOR, dynamic=False),
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": _Inputs(NumberType.INT, 8, _TOKEN, dynamic=True),
    "NVFP4": _Inputs(NumberType.FLOAT, 4, _GROUP, dynamic="local"),
}
"""By algorithm; None for inputs of the model's dtype."""


@dataclass(slots=True)
class InputModes:
    """The Linears whose inputs the engine quantizes otherwise than the source, by what both do."""

    faults: FaultCollector
    _wrong: dict[tuple[str, str], dict[str, None]] = field(default_factory=dict)

    def compare(self, part: Located, algo: str | None, inputs: QuantArgs | None) -> bool:
        """Return whether the algorithm quantizes inputs by `inputs`, the scheme of the source, None for 16 bits.

        A Linear that is plain in the engine may be dequantized. Others are remembered for `report`.
        """
        if algo is None or _agrees(_INPUTS[algo], inputs):
            return True
        expected = inputs.label() if inputs is not None else "16 bits"
        names = self._wrong.setdefault((expected, algo), {})
        names[f"rank{part.rank}.safetensors: {part.name}"] = None
        return False

    def report(self) -> None:
        """Add a fault for each difference, whatever the number of Linears and ranks."""
        for (expected, algo), names in self._wrong.items():
            first = next(iter(names))
            rank = first.partition(":")[0]
            more = sum(name.startswith(f"{rank}:") for name in names) - 1
            self.faults.add(
                where=f"{first} and {more} more" if more else first,
                expected=f"inputs in {expected}, as the source has them",
                found=f"those of {algo}",
                remedy="Convert again into an empty directory.",
            )


def _agrees(engine: _Inputs | None, source: QuantArgs | None) -> bool:
    """Whether an engine's inputs are those of a scheme."""
    if engine is None or source is None:
        return engine is None and source is None
    return (
        (source.type, source.num_bits, source.dynamic) == (engine.type, engine.bits, engine.dynamic)
        and source.strategy in engine.strategies
        and source.symmetric
    )
