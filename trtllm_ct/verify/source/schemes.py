"""The scheme of a module in the configuration.

Which group targets a module is decided by `config/match.py`, the matching of the library; the conversion uses it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_ct.base.schemes import Strategy
from trtllm_ct.config.match import Matcher
from trtllm_ct.verify.source.decoders import DECODERS, decoder_for
from trtllm_ct.verify.source.weights import Weight

if TYPE_CHECKING:
    from trtllm_ct.base.schemes import QuantArgs, QuantScheme
    from trtllm_ct.config.quantization_config import QuantizationConfig
    from trtllm_ct.verify.source.modules import Module
    from trtllm_ct.verify.source.names import Names

__all__ = ["Schemes"]


class Schemes:
    """Finds the scheme of a module."""

    def __init__(self, config: QuantizationConfig, names: Names) -> None:
        self._config = config
        self._names = names
        self._matcher = Matcher(config)

    def args(self, module: Module) -> QuantArgs | None:
        """Return the arguments of a module's weight; None without any."""
        scheme = self.scheme(module)
        return scheme.weights if scheme is not None else None

    def scheme(self, module: Module) -> QuantScheme | None:
        """Return the scheme of a module's group; None without one.

        Of several groups that target the module, the only one that fits its tensors counts, else the one that the
        library takes. A module that no group targets has the only group of all that fits.
        """
        class_name = "Embedding" if module.key == "embed_tokens" else "Linear"
        for name in self._names.variants(module.name, module.key):
            groups = [claim.group.scheme for claim in self._matcher.claims(name, (class_name,))]
            claiming = [scheme for scheme in groups if scheme.weights is not None]
            if claiming:
                fitting = [scheme for scheme in claiming if _fits(scheme.weights, module)]
                return fitting[0] if len(fitting) == 1 else claiming[0]
        fitting = [group.scheme for group in self._config.groups if _fits(group.scheme.weights, module)]
        return fitting[0] if len(fitting) == 1 else None


def _fits(args: QuantArgs | None, module: Module) -> bool:
    """Whether the tensors of a module may have been written with these arguments: codes, words and scales."""
    if args is None:
        return False
    name = decoder_for(module.tensors)
    if name is None or DECODERS[name].number not in {(args.type, None), (args.type, args.num_bits)}:
        return False
    weight = Weight(module=module, args=args, release=())
    rows, columns = DECODERS[name].shape(weight)
    packed, scale = module.tensors.get("weight_packed"), module.tensors.get("weight_scale")
    if name == "pack-quantized" and packed is not None:
        widths = {-(-columns * args.num_bits // 32), -(-columns // (32 // args.num_bits))}
        if packed.shape[-1] not in widths:
            return False
    if scale is None or scale.size == module.parts:
        return True
    if args.strategy is Strategy.BLOCK and args.block_structure:
        height, width = args.block_structure
        return scale.size == -(-rows // height) * -(-columns // width)
    return scale.size == rows * -(-columns // (args.group_size or columns))
