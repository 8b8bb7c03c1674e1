"""Put delivered tensors into the shell of a model, and prove that the result is complete.

Two sources must agree for each Linear: the algorithm that the quantization configuration names, and the tensors that
are delivered. A disagreement, a tensor without a place and a parameter without a tensor are faults; all faults are
raised together.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trtllm_ct.base.errors import FaultCollector, PlanError
from trtllm_ct.reference.architecture import kept_in_float32, tied_parameters
from trtllm_ct.reference.attention import attach_kv_scales, is_kv_scale
from trtllm_ct.reference.linear import ReferenceLinear
from trtllm_ct.reference.mixtures import Mixtures
from trtllm_ct.reference.rules import WIDE_FLOATS, describe, has_dtype
from trtllm_ct.reference.shared_values import add_values, drop_values

if TYPE_CHECKING:
    from trtllm_ct.engine.quant_config import LayerQuantConfig, QuantConfig
    from trtllm_ct.reference.names import NameMap

__all__ = ["Assembly"]

# Older releases of transformers store this buffer in every layer; all architectures compute it from config.json.
_COMPUTED_BUFFER = ".rotary_emb.inv_freq"


class Assembly:
    """Takes delivered tensors one by one, puts each where it belongs, and collects faults until `finish`.

    `names` translates names of the checkpoint, both tensor names and those in `quant_config`, to paths in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        quant_config: QuantConfig,
        names: NameMap,
        *,
        dtype: torch.dtype,
        quantize_activations: bool,
    ) -> None:
        quant_config = names.translate(quant_config)
        self._values = add_values(model)
        self._model = model
        self._names = names
        self._quantize_activations = quantize_activations
        self._has_kv_scales = quant_config.kv_cache_quant_algo is not None
        self._float32 = kept_in_float32(model, dtype)
        self._faults = FaultCollector()
        self._tied = tied_parameters(model)
        self._mixtures = Mixtures(
            model, quant_config, names, dtype=dtype, quantize_activations=quantize_activations, faults=self._faults
        )
        # Routers are never quantized. In transformers 5 they are subclasses of Linear and return more than a product.
        self._linears = {
            name: module
            for name, module in model.named_modules()
            if type(module) is nn.Linear and not self._mixtures.has_linear(name) and not self._mixtures.has_router(name)
        }
        self._quantized = self._find_quantized(quant_config)
        self._slots = {
            name: slot
            for name, slot in model.state_dict().items()
            if (owner := name.rpartition(".")[0]) not in self._quantized and not self._mixtures.has_linear(owner)
        }
        self._taken: set[str] = set()
        self._filled: set[str] = set()
        self._parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._kv_scales: dict[str, Tensor] = {}

    def take(self, name: str, tensor: Tensor) -> None:
        """Store one delivered tensor at the place that its full name belongs to.

        Tensors of parts that the model does not have, such as a vision tower, are ignored.
        """
        path = self._names.path(name)
        if path is None:
            return
        owner, _, local = path.rpartition(".")
        if path in self._taken:
            self._faults.add(
                where=name, expected="one tensor of this name", found="a second one", remedy="Deliver each name once."
            )
        self._taken.add(path)
        if self._has_kv_scales and is_kv_scale(path):
            self._kv_scales[path] = tensor
        elif owner in self._quantized:
            self._parts[owner][local] = tensor
        elif path in self._slots:
            self._fill_dense(path, tensor)
        elif not self._mixtures.take(path, tensor) and not path.endswith(_COMPUTED_BUFFER):
            self._refuse(path, name, tensor)

    def finish(self) -> None:
        """Build the quantized Linears and experts, restore tied parameters and check that every parameter is filled.

        Raises `PlanError` with all faults.
        """
        self._drop_values()
        for name, layer in self._quantized.items():
            self._build_linear(name, layer)
        may_stay_empty = self._mixtures.finish(self._filled)
        if self._has_kv_scales:
            attach_kv_scales(self._model, self._kv_scales, self._faults)
        for name, owner in self._tied.items():
            self._tie(name, owner)
        for name in sorted(self._slots.keys() - self._filled - may_stay_empty):
            self._faults.add(
                where=self._names.stored(name),
                expected=f"a tensor {list(self._slots[name].shape)} for this part of the model",
                found="none among those delivered",
                remedy="Check that no shard is missing and that config.json belongs to these weights.",
            )
        self._faults.raise_if_any(PlanError)

    def _drop_values(self) -> None:
        """Take away every v_proj that the model does without, and for which no tensor was delivered."""
        taken = {path.rpartition(".")[0] for path in self._taken}
        unused = self._values - taken
        drop_values(self._model, unused)
        self._quantized = {name: layer for name, layer in self._quantized.items() if name not in unused}
        self._slots = {name: slot for name, slot in self._slots.items() if name.rpartition(".")[0] not in unused}

    def _find_quantized(self, quant_config: QuantConfig) -> dict[str, LayerQuantConfig]:
        """The quantized Linears by path, with their configuration.

        A Linear that is tied to an embedding is unquantized, like the embedding. Adds a fault for every entry of
        `quantized_layers` that names neither an untied Linear of the model nor a part of a mixture-of-experts layer.
        """
        tied = self._tied.keys() | set(self._tied.values())
        linears = {name for name in self._linears if f"{name}.weight" not in tied}
        for name in sorted(quant_config.quantized_layers.keys() - linears):
            if self._mixtures.has(name):
                continue
            self._faults.add(
                where=f"quantized_layers: {self._names.stored(name)}",
                expected=f"a Linear of {type(self._model).__name__} with a weight of its own",
                found="one tied to the embeddings" if name in self._linears else "none of that name",
                remedy="Check the name, its prefix above all, and tie_word_embeddings in config.json.",
            )
        layers = {name: quant_config.layer_config(name) for name in sorted(linears)}
        return {name: layer for name, layer in layers.items() if layer is not None}

    def _build_linear(self, name: str, layer: LayerQuantConfig) -> None:
        shell = self._linears[name]
        try:
            linear = ReferenceLinear(
                self._parts.pop(name, {}),
                layer=layer,
                in_features=shell.in_features,
                out_features=shell.out_features,
                bias=shell.bias is not None,
                quantize_activations=self._quantize_activations,
                name=self._names.stored(name),
            )
        except PlanError as error:
            self._faults.faults.extend(error.faults)
        else:
            self._model.set_submodule(name, linear)

    def _fill_dense(self, name: str, tensor: Tensor) -> None:
        """Put an unquantized tensor into its parameter or buffer.

        A float is cast to the dtype of its place, or to float32 where transformers keeps it in float32. A tensor that
        `NameMap.transposed` names is transposed if it fits then. Adds a fault for a wrong shape or dtype.
        """
        slot = self._slots[name]
        self._filled.add(name)
        # Where both orders have the same shape, the order of the class counts.
        if name.endswith(self._names.transposed) and tensor.mT.shape == slot.shape:
            tensor = tensor.mT.contiguous()
        is_float = slot.is_floating_point()
        fits = tensor.shape == slot.shape or self._mixtures.fits_fewer(name, tensor, slot)
        if fits and (not is_float or has_dtype(tensor, WIDE_FLOATS)):
            dtype = torch.float32 if self._float32.search(name) else slot.dtype
            self._assign(name, tensor.to(dtype) if is_float else tensor)
            return
        self._faults.add(
            where=self._names.stored(name),
            expected=f"an unquantized tensor {list(slot.shape)}",
            found=describe(tensor),
            remedy="If the module is quantized, quant_config must say so; if not, config.json is another model's.",
        )

    def _assign(self, name: str, tensor: Tensor) -> None:
        owner, _, local = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if isinstance(getattr(module, local), nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(module, local, tensor)

    def _tie(self, alias: str, owner: str) -> None:
        """Make two tied parameters one object again. Either may be delivered, or both if their values are equal."""
        delivered = [name for name in (owner, alias) if name in self._filled] or [owner]
        parameters = [self._model.get_parameter(name) for name in delivered]
        if not any(parameter.is_meta for parameter in parameters) and not torch.equal(parameters[0], parameters[-1]):
            self._faults.add(
                where=alias,
                expected=f"the values of {owner}, to which config.json ties it",
                found="other values",
                remedy="Set tie_word_embeddings to false in config.json if the two really differ.",
            )
        for name in (owner, alias):
            self._assign(name, parameters[0])
        self._filled.add(owner if delivered == [alias] else alias)

    def _refuse(self, path: str, name: str, tensor: Tensor) -> None:
        """Add a fault for a tensor that has no place in the model."""
        owner = path.rpartition(".")[0]
        if is_kv_scale(path):
            expected = "no KV-cache scale, because kv_cache_quant_algo is not set"
            remedy = "State the kv_cache_quant_algo that the scale belongs to."
        elif owner in self._linears:
            expected = "weight and bias only, because quant_config leaves this module unquantized"
            remedy = "List the module in quantized_layers or take it out of exclude_modules."
        else:
            expected = f"a tensor that {type(self._model).__name__} has a place for"
            remedy = "Check the name, its prefix above all, and that config.json belongs to these weights."
        self._faults.add(where=name, expected=expected, found=describe(tensor), remedy=remedy)
