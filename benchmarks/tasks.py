"""The tasks of the timed processes: `python -m benchmarks.tasks NAME ARGUMENT...` prints one line of JSON at the end.

`seconds` in this JSON object is the time of the call alone: every task imports what it uses before the clock starts.
Anything else that a task does happens after the clock has stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import anonymous_bytes
from benchmarks.node import node_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from trtllm_ct.base.schemes import TensorSpec
    from trtllm_ct.checkpoint.catalog import Catalog
    from trtllm_ct.pipeline.open import Checkpoint
    from trtllm_ct.plan.models.site import Site
    from trtllm_ct.plan.plan import ModulePlan, Plan

__all__ = ["TASKS", "main"]


def load_weights(directory: str, layout: str) -> dict[str, Any]:
    """This package: load all weights into memory."""
    import torch

    from trtllm_ct.layouts.loops import kernels
    from trtllm_ct.pipeline.loader import CompressedTensorsWeightLoader
    from trtllm_ct.pipeline.open import open_checkpoint

    loader = CompressedTensorsWeightLoader(decompressor="native")
    _keep_imported(torch, kernels)
    before, started = anonymous_bytes(), time.perf_counter()
    weights = loader.load_weights(directory, layout=layout)  # type: ignore[arg-type]
    facts = _load_facts(started, weights)
    checkpoint = open_checkpoint(directory)
    plan = checkpoint.plan("dense" if layout == "dense" else "modelopt")
    return facts | {
        "before_bytes": before,
        "mapped_bytes": _mapped_bytes(plan),
        "group_bytes": _group_bytes(checkpoint, plan),
    }


def load_file(directory: str) -> dict[str, Any]:
    """Peer `load_file`: copy all tensors into memory as they are stored."""
    from safetensors.torch import load_file as load

    files = sorted(Path(directory).glob("*.safetensors"))
    started = time.perf_counter()
    weights = {name: tensor.clone() for file in files for name, tensor in load(file).items()}
    return _load_facts(started, weights)


def library_load(directory: str) -> dict[str, Any]:
    """Peer `library`: dequantize all weights in memory with the compressed-tensors library."""
    import torch
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
    from safetensors.torch import load_file as load

    files = sorted(Path(directory).glob("*.safetensors"))
    started = time.perf_counter()
    dequantizer = CompressedTensorsDequantizer(directory, dtype=torch.bfloat16)
    stored = {name: tensor for file in files for name, tensor in load(file).items()}
    return _load_facts(started, dequantizer.process(stored))


def library_convert(directory: str, out: str) -> dict[str, Any]:
    """Peer `library`: convert to a plain directory with the compressed-tensors library."""
    import torch
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer, convert_checkpoint

    started = time.perf_counter()
    convert_checkpoint(directory, out, CompressedTensorsDequantizer(directory, dtype=torch.bfloat16))
    return {"seconds": time.perf_counter() - started}


def transformers_load(directory: str) -> dict[str, Any]:
    """Peer `transformers`: load a transformers model with plain weights."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    return _load_facts(started, dict(model.named_parameters()))


def inspect(directory: str) -> dict[str, Any]:
    """This package: run the command `inspect` and discard its output."""
    from trtllm_ct.cli import commands as cli

    started = time.perf_counter()
    with (
        Path(os.devnull).open("w", encoding="utf-8") as null,
        contextlib.redirect_stdout(null),
        contextlib.suppress(SystemExit),
    ):
        sys.argv = ["trtllm-ct", "inspect", directory]
        cli.main()
    return {"seconds": time.perf_counter() - started, "torch_imported": "torch" in sys.modules}


def rank_bytes(directory: str, ranks: str) -> dict[str, Any]:
    """This package: the bytes that rank 0 reads of a checkpoint, and the bytes stored, by how modules are sliced."""
    from trtllm_ct.checkpoint.reader import TensorReader
    from trtllm_ct.engine.parallel import Cut, Parallel, Rank
    from trtllm_ct.pipeline.open import open_checkpoint
    from trtllm_ct.pipeline.stream import stream_delivered
    from trtllm_ct.plan.ranks.cuts import cut_of
    from trtllm_ct.plan.ranks.shard import plan_for_rank

    checkpoint = open_checkpoint(directory)
    parallel = Parallel(tensor=int(ranks))
    plan = checkpoint.plan(parallel=parallel)
    cut_by_module = {site.module: cut_of(site, parallel) for site in _sites(checkpoint)}
    stored_bytes = {
        module.name: sum(spec.nbytes for spec in _stored_specs(module, checkpoint.catalog)) for module in plan.modules
    }
    cuts: dict[str, dict[str, int]] = {}
    started, read_before = time.perf_counter(), 0
    reader = TensorReader(checkpoint.catalog)
    # A single worker does not read ahead, so that the bytes read since the last module are those of this module.
    for module, _tensors in stream_delivered(
        plan_for_rank(plan, checkpoint.model, Rank(parallel=parallel)), checkpoint.catalog, reader=reader, workers=1
    ):
        nbytes = cuts.setdefault(str(cut_by_module.get(module.name, Cut.NONE)), {"read": 0, "stored": 0})
        nbytes["read"] += reader.bytes_read - read_before
        nbytes["stored"] += stored_bytes[module.name]
        read_before = reader.bytes_read
    return {"seconds": time.perf_counter() - started, "cuts": cuts}


def kernels(rows: str, columns: str, runs: str) -> dict[str, Any]:
    """This package and its peer memcpy: time loops and memcpy alternately."""
    from benchmarks.kernels import time_kernels

    return {"kernels": time_kernels(int(rows), int(columns), int(runs))}


TASKS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "inspect": inspect,
    "kernels": kernels,
    "library-convert": library_convert,
    "library-load": library_load,
    "load-file": load_file,
    "load-weights": load_weights,
    "node-bytes": node_bytes,
    "rank-bytes": rank_bytes,
    "transformers-load": transformers_load,
}
"""All tasks by name; their arguments are strings."""


def main() -> None:
    """Run the task that the command line names and print its result as JSON."""
    name, *arguments = sys.argv[1:]
    print(json.dumps(TASKS[name](*arguments)))


def _keep_imported(*_modules: object) -> None:
    """Use modules that a task imports only so that their import is not timed."""


def _load_facts(started: float, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the facts about loaded weights: seconds since `started`, their bytes, and the memory of the process.

    `held_bytes` is the anonymous memory of the process while the weights are in memory.
    """
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "held_bytes": anonymous_bytes(),
        "weight_bytes": sum(tensor.nbytes for tensor in weights.values()),
    }


def _mapped_bytes(plan: Plan) -> int:
    """Return the delivered bytes that are views of memory-mapped files."""
    deliveries = (delivery for module in plan.modules for delivery in module.deliveries)
    return sum(delivery.spec.nbytes for delivery in deliveries if delivery.operation.same_bytes)


def _sites(checkpoint: Checkpoint) -> Iterable[Site]:
    """Return the sites of a checkpoint."""
    from trtllm_ct.base.errors import FaultCollector
    from trtllm_ct.plan.gathering import gather_modules

    stored = gather_modules(
        checkpoint.catalog, checkpoint.model, FaultCollector(), checkpoint.probe.shapes, split_stacks=True
    )
    model = checkpoint.model.in_checkpoint(stored)
    return model.sites(model.place(stored))


def _group_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Return the bytes of the largest group of Linears that an engine fuses, without tensors that are views."""
    group_of = {site.module: site.mode_group for site in _sites(checkpoint)}
    sizes: Counter[str] = Counter()
    for module in plan.modules:
        converted = (delivery.spec.nbytes for delivery in module.deliveries if not delivery.operation.same_bytes)
        sizes[group_of.get(module.name) or module.name] += sum(converted)
    return max(sizes.values())


def _stored_specs(module: ModulePlan, catalog: Catalog) -> list[TensorSpec]:
    """Return the specs of the stored tensors of a module."""
    return [catalog.tensors[run.name].spec for run in module.runs]


if __name__ == "__main__":
    main()
