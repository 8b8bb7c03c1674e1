"""The scheme of a module in the configuration.

Which group targets a module is decided by `config/match.py`, the matching of the library; the conversion uses it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.config.match import Matcher
from trtllm_ct.verify.source.decoders import DECODERS, decoder_for

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import QuantArgs
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.verify.source.modules import Module
    from trtllm_ct.verify.source.names import Names

__all__ = ["Schemes"]


class Schemes:
    """Finds the arguments of the weights of a module."""

    def __init__(self, config: QuantizationConfig, names: Names) -> None:
        self._config = config
        self._names = names
        self._matcher = Matcher(config)

    def args(self, module: Module) -> QuantArgs | None:
        """Return the arguments of a module's group, or of the only group that fits its tensors; None without one."""
        class_name = "Embedding" if module.key == "embed_tokens" else "Linear"
        for name in self._names.variants(module.name, module.key):
            group = self._matcher.scheme_for(name, (class_name,))
            if group is not None and group.scheme.weights is not None:
                return group.scheme.weights
        decoder = decoder_for(module.tensors)
        number = DECODERS[decoder].number if decoder else None
        weights = [group.scheme.weights for group in self._config.groups if group.scheme.weights is not None]
        fitting = [args for args in weights if number in {(args.type, None), (args.type, args.num_bits)}]
        return fitting[0] if len(fitting) == 1 else None
