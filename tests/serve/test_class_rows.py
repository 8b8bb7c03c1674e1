"""Classes with a row, on the double, on one, two and four ranks: each rank's weights.

Converted for stock, and loaded by this package. Every Linear, every expert and every other parameter holds the slice of
the stored values that the class computes with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import engine_double
import pytest
import torch
from class_models import CLASSES, text_of, write_class
from engine_fixtures import BINDINGS
from rank_slices import differs, experts_of, held_weight, rows_of_rank

import trtllm_ct
from trtllm_ct.convert.convert import convert_checkpoint
from trtllm_ct.engine.parallel import Parallel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from builders import Built
    from torch import Tensor

pytestmark = pytest.mark.usefixtures("sidecar_cache")

CELLS = [("Qwen3NextForCausalLM", "mid"), *((name, "newest") for name in CLASSES)]
MIXED = {"o_proj": "int8-channel", "out_proj": "int4-g128"}
SCHEMES = ("fp8-channel-token", "int4-g128", "fp8-block", "nvfp4")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """Return each checkpoint, which is written once; with scheme "mixed", some Linears have other modes."""
    written: dict[tuple[str, str], Built] = {}

    def get(name: str, scheme: str) -> Built:
        if (name, scheme) not in written:
            uniform, others = (scheme, {}) if scheme != "mixed" else ("fp8-channel-token", MIXED)
            written[name, scheme] = write_class(tmp_path_factory.mktemp("stored") / "in", name, uniform, others=others)
        return written[name, scheme]

    return get


def ranks(engine: Any, directory: Path, tensor: int, *, stock: bool) -> Iterator[Any]:
    """Yield the text model of each rank of a directory, loaded by stock or by this package."""
    more = {"skip_tokenizer_init": True, "tensor_parallel_size": tensor}
    with engine.LLM(model=str(directory), **more) if stock else trtllm_ct.LLM(directory, **more) as llm:
        assert len(llm.models) == tensor
        yield from (getattr(model, "llm", model) for model in llm.models)


def in_proj_parts(around: str, packed: str, dense: Mapping[str, Tensor], text: Mapping[str, Any]) -> list[Tensor]:
    """The rows of queries, keys, values and z, or of b and a, each [key heads, rows of one, hidden]."""
    heads, ratio = text["linear_num_key_heads"], text["linear_num_value_heads"] // text["linear_num_key_heads"]
    keys, values = text["linear_key_head_dim"], ratio * text["linear_value_head_dim"]
    sizes = [keys, keys, values, values] if packed == "in_proj_qkvz" else [ratio, ratio]
    joint = dense.get(f"{around}.{packed}.weight")
    if joint is not None:
        return list(joint.unflatten(0, (heads, -1)).split(sizes, dim=1))
    if packed == "in_proj_ba":
        parts = [dense[f"{around}.in_proj_{part}.weight"] for part in "ba"]
    else:
        qkv = dense[f"{around}.in_proj_qkv.weight"].split([heads * keys, heads * keys, heads * values])
        parts = [*qkv, dense[f"{around}.in_proj_z.weight"]]
    return [part.unflatten(0, (heads, -1)) for part in parts]


def of_linear_attention(name: str, module: Any, built: Built, generation: str) -> Tensor:
    """This rank's slice of a Linear of linear attention whose rows belong to heads."""
    text, (around, _, leaf) = text_of(built.config), name.rpartition(".")
    size, rank = module.tp_size, module.tp_rank
    if leaf == "conv1d":
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        parts = built.dense[f"{name}.weight"].squeeze(1).split([keys, keys, values])
        return torch.cat([part.chunk(size)[rank] for part in parts])
    parts = [part.chunk(size)[rank] for part in in_proj_parts(around, leaf, built.dense, text)]
    if generation == "newest":
        return torch.cat([part.flatten(0, 1) for part in parts])
    return torch.cat(parts, dim=1).flatten(0, 1)


def slice_of(name: str, module: Any, built: Built, generation: str) -> Tensor:
    """What a Linear of the engine should hold on this rank."""
    name = name.replace(".mlp.mlp.", ".mlp.")
    around, _, leaf = name.rpartition(".")
    if leaf in {"conv1d", "in_proj_qkvz", "in_proj_ba"}:
        return of_linear_attention(name, module, built, generation)
    parts = [built.dense[f"{around}.{part}.weight".lstrip(".")] for part in FUSED.get(leaf, (leaf,))]
    if module.tp_size > 1 and module.tp_mode == "column":
        return rows_of_rank(parts, module, text_of(built.config)["num_key_value_heads"])
    weight = torch.cat(parts)
    return weight.chunk(module.tp_size, dim=1)[module.tp_rank] if module.tp_mode == "row" else weight


def compared(model: Any, built: Built, generation: str) -> dict[str, bool]:
    """Return every module of a rank, and whether it holds something else than its slice of what is stored."""
    wrong: dict[str, bool] = {}
    mapping = model.model_config.mapping
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear":
            wrong[name] = differs(held_weight(module), slice_of(name, module, built, generation))
        elif hasattr(module, "expert_ids"):
            wrong |= dict(experts_of(name.removesuffix(".backend"), module, built.dense))
        elif name.endswith("linear_attn"):
            for local in ("A_log", "dt_bias"):
                exact = built.dense[f"{name}.{local}"].chunk(mapping.tp_size)[mapping.tp_rank]
                wrong[f"{name}.{local}"] = differs(getattr(module, local), exact)
        elif name.endswith(("norm", "mlp.gate")):
            wrong[name] = differs(module.weight, built.dense[f"{name}.weight"])
    return wrong


@pytest.mark.pairs
@pytest.mark.parametrize(
    ("scheme", "tensor"), [*((scheme, tensor) for scheme in SCHEMES for tensor in (1, 2, 4)), ("mixed", 2)]
)
@pytest.mark.parametrize(("name", "generation"), CELLS)
def test_each_rank_holds_its_slices(
    stored: Callable[..., Built], tmp_path: Path, name: str, generation: str, scheme: str, tensor: int
) -> None:
    built, out = stored(name, scheme), tmp_path / "out"
    release = engine_double.RELEASE_OF[generation]
    convert_checkpoint(built.directory, out, engine=release, parallel=Parallel(tensor=tensor))

    with engine_double.installed(generation, importers=[BINDINGS]) as engine:
        for directory, stock in ((out, True), (built.directory, False)):
            for model in ranks(engine, directory, tensor, stock=stock):
                found = compared(model, built, generation)
                assert {name for name, wrong in found.items() if wrong} == set()
                assert {"lm_head", "model.layers.0.linear_attn.conv1d", "model.layers.1.self_attn.qkv_proj"} <= {*found}
