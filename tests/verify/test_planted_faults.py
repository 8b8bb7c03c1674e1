"""Faults planted in the conversion are found by verification, which runs with the fault in place.

Each fault is a single wrong step in a piece of code that made the output: a codec, a layout, the map of names, the
order of rows. A verification that shares that piece would repeat the fault and find nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import Built, tiny_config, write_checkpoint
from fused_experts import fuse_experts
from mistral_form import write_native
from on_tensors import Scaling

from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.formats import codecs
from trtllm_ct.layouts.torch_tensors import array_of, tensor_of
from trtllm_ct.plan import ops, row_order
from trtllm_ct.plan.models import fused_experts, mistral_names
from trtllm_ct.plan.stored import ExpertSlice
from trtllm_ct.verify.verify import verify_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


DENSE = tiny_config(layers=1)
WIDER = tiny_config(layers=1, hidden=256, intermediate=256, heads=2, kv_heads=2)
WIDE = {"config": tiny_config(layers=1, hidden=128, intermediate=256)}
# Hidden and intermediate size are equal, so that no shape tells a wrong expert from a right one.
MIXTURE = tiny_config("Qwen3MoeForCausalLM", layers=1, hidden=64, moe_intermediate_size=64, vocabulary=32)
MIXTRAL = tiny_config("MixtralForCausalLM", layers=1, hidden=64, intermediate=64, vocabulary=32)

Plant = Callable[[pytest.MonkeyPatch], None]


def dequantizing(change: Callable[[Tensor, Scaling], tuple[Tensor, Scaling]]) -> Plant:
    """Dequantize other codes or other scales than those that were decoded."""
    right = codecs.dequantize

    def wrong(values: Any, packing: Any, element: Any, shape: Any, scaling: Any, dtype: Any) -> Any:
        changed, other = change(tensor_of(values), Scaling.of(scaling))
        return right(array_of(changed), packing, element, shape, other.arrays, dtype)

    return lambda patch: patch.setattr(codecs, "dequantize", wrong)


def zero_point_added(values: Tensor, scaling: Scaling) -> tuple[Tensor, Scaling]:
    assert scaling.zero_point is not None
    return values, replace(scaling, zero_point=-scaling.zero_point)


def one_zero_point_shifted(values: Tensor, scaling: Scaling) -> tuple[Tensor, Scaling]:
    assert scaling.zero_point is not None
    zero_point = scaling.zero_point.clone()
    zero_point.view(-1)[-1] += 1
    return values, replace(scaling, zero_point=zero_point)


def global_scale_multiplied(values: Tensor, scaling: Scaling) -> tuple[Tensor, Scaling]:
    assert scaling.divisor is not None
    return values, replace(scaling, divisor=1 / scaling.divisor)


def nibbles_swapped(values: Tensor, scaling: Scaling) -> tuple[Tensor, Scaling]:
    packed = values.view(torch.uint8)
    return (packed << 4 | packed >> 4).view(values.dtype), scaling


def next_group(values: Tensor, scaling: Scaling) -> tuple[Tensor, Scaling]:
    return values, replace(scaling, scale=scaling.scale.view(torch.uint8).roll(1, -1).view(scaling.scale.dtype))


def next_row(values: Tensor, scaling: Scaling) -> tuple[Tensor, Scaling]:
    return values, replace(scaling, scale=scaling.scale.roll(1, 0))


def group_index_ignored(values: Tensor, scaling: Scaling) -> tuple[Tensor, Scaling]:
    return values, replace(scaling, group_index=None)


def gate_and_up_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(fused_experts._PARTS, "gate_up_proj", (1, 0))


def experts_reversed(patch: pytest.MonkeyPatch) -> None:
    right = fused_experts._pieces
    patch.setattr(
        fused_experts, "_pieces", lambda view, expert, *rest: right(view, view.spec.shape[0] - 1 - expert, *rest)
    )


def experts_transposed(patch: pytest.MonkeyPatch) -> None:
    right = ExpertSlice.of
    patch.setattr(ExpertSlice, "offset", property(lambda _: None))
    patch.setattr(ExpertSlice, "of", lambda view, stored: array_of(tensor_of(right(view, stored)).T.contiguous()))


def heads_not_reordered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(row_order, "halves_of_pairs", lambda rows, _head_dim: rows)


def heads_of_half_the_size(patch: pytest.MonkeyPatch) -> None:
    right = row_order.halves_of_pairs
    patch.setattr(row_order, "halves_of_pairs", lambda rows, head_dim: right(rows, head_dim // 2))


def keys_and_values_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(mistral_names._OF_LAYER, "attention.wk", "self_attn.v_proj")
    patch.setitem(mistral_names._OF_LAYER, "attention.wv", "self_attn.k_proj")


def gate_is_w3(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mistral_names, "_PROJECTION_OF_EXPERT", {"w1": 1, "w3": 0, "w2": 2})


def truncated(patch: pytest.MonkeyPatch) -> None:
    """Cut the lower bits of float32 off instead of rounding."""

    def cut(values: Any, dtype: Any) -> Any:
        bits = torch.from_numpy(values).float().view(torch.int32) & ~0x1FFF
        return array_of(bits.view(torch.float32).to(dtype.torch_dtype))

    patch.setattr(ops, "round_once", cut)


def delivering(operation: type[ops.Operation], change: Callable[[Tensor], object]) -> Plant:
    """Change the tensors that an operation delivers, in place."""
    right = operation.run

    def wrong(self: ops.Operation, name: str, module: Any) -> Any:
        tensor = tensor_of(right(self, name, module)).clone()
        change(tensor)
        return array_of(tensor)

    return lambda patch: patch.setattr(operation, "run", wrong)


def last_nibble_off_by_one(packed: Tensor) -> None:
    packed.view(torch.uint8).view(-1)[-1] ^= 0x10


def last_bit_of_last_number(numbers: Tensor) -> None:
    numbers.view(torch.uint8).view(-1)[-numbers.itemsize] ^= 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault, and a checkpoint and a target in whose conversion it takes effect."""

    plant: Plant
    to: str = "dense"
    native_form: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    convert: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> Built | None:
        if self.native_form:
            scheme = self.options.get("scheme", "fp8-tensor-token")
            write_native(directory, scheme, config=self.options["config"])
            return None
        return write_checkpoint(directory, **({"config": DENSE} | self.options))


NATIVE = {"config": tiny_config("MistralForCausalLM", layers=1, hidden=128, heads=4, kv_heads=4)}

CASES = {
    "zero point added instead of subtracted": Case(
        plant=dequantizing(zero_point_added), options={"scheme": "int4-g32-asym"}
    ),
    "gate and up swapped for fused experts": Case(
        plant=gate_and_up_swapped, to="modelopt", options={"config": MIXTURE, "scheme": "fp8-channel-token"}
    ),
    "gate and up swapped for fused experts, dequantized": Case(
        plant=gate_and_up_swapped, options={"config": MIXTURE, "scheme": "nvfp4"}
    ),
    "experts in another order": Case(
        plant=experts_reversed, to="modelopt", options={"config": MIXTURE, "scheme": "fp8-channel-token"}
    ),
    "experts transposed": Case(plant=experts_transposed, options={"config": MIXTURE, "scheme": "dense"}),
    "global scale of nvfp4 multiplied": Case(plant=dequantizing(global_scale_multiplied), options={"scheme": "nvfp4"}),
    "nibbles of a byte in the other order": Case(plant=dequantizing(nibbles_swapped), options={"scheme": "mxfp4a16"}),
    "scales of the next group": Case(plant=dequantizing(next_group), options={"scheme": "nvfp4"}),
    "scales of the next row": Case(plant=dequantizing(next_row), options={"scheme": "int8-plain-channel-asym"}),
    "group index ignored": Case(plant=dequantizing(group_index_ignored), options={"scheme": "int4-g64-actorder"}),
    "heads left in Mistral's order": Case(plant=heads_not_reordered, native_form=True, options=NATIVE),
    "heads of another size": Case(plant=heads_of_half_the_size, native_form=True, options=NATIVE),
    "keys and values swapped": Case(plant=keys_and_values_swapped, native_form=True, options=NATIVE),
    "w1 read as up": Case(plant=gate_is_w3, native_form=True, options={"config": MIXTRAL}),
    "one int4 code off by one": Case(
        plant=delivering(ops.Repack, last_nibble_off_by_one), to="modelopt", options=WIDE | {"scheme": "int4-g64"}
    ),
    "one int8 code off by one": Case(
        plant=delivering(ops.Repack, last_bit_of_last_number), to="modelopt", options=WIDE | {"scheme": "int8-channel"}
    ),
    "the scale of one group of int4 off in its last bit": Case(
        plant=delivering(ops.WidenScale, last_bit_of_last_number), to="modelopt", options=WIDE | {"scheme": "int4-g64"}
    ),
    "the scale of one row of int8 off in its last bit": Case(
        plant=delivering(ops.WidenScale, last_bit_of_last_number),
        to="modelopt",
        options=WIDE | {"scheme": "int8-channel"},
    ),
    "the scale of one block of fp8 off in its last bit": Case(
        plant=delivering(ops.WidenScale, last_bit_of_last_number),
        to="modelopt",
        options={"config": WIDER, "scheme": "fp8-block"},
    ),
    "one zero point off by one": Case(plant=dequantizing(one_zero_point_shifted), options={"scheme": "int4-g32-asym"}),
    "values cut off instead of rounded": Case(
        plant=truncated,
        options={"config": DENSE | {"dtype": "float32"}, "scheme": "dense"},
        convert={"dtype": "float16"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_planted_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = CASES[name]
    fused = case.plant in {gate_and_up_swapped, experts_reversed, experts_transposed}
    edit = {"edit": fuse_experts} if fused else {}
    replace(case, options=case.options | edit).write(tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "right", to=case.to, **case.convert)
    assert verify_checkpoint(tmp_path / "in", tmp_path / "right").faults == ()

    case.plant(monkeypatch)
    convert_checkpoint(tmp_path / "in", tmp_path / "wrong", to=case.to, **case.convert)

    assert not verify_checkpoint(tmp_path / "in", tmp_path / "wrong").good
