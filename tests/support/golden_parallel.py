"""What becomes of the modules of each real checkpoint at each parallel size, as `serve/golden_parallel.json` has it.

The table is committed and reviewed by eye, so that a change of it is a decision. Native modules are counted by mode.

    python tests/support/golden_parallel.py FOLDER > tests/serve/golden_parallel.json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_ct import open_checkpoint
from trtllm_ct.base.errors import PlanError
from trtllm_ct.engine.parallel import Parallel
from trtllm_ct.engine.releases import DEFAULT_ENGINE

if TYPE_CHECKING:
    from trtllm_ct.pipeline.open import Checkpoint

__all__ = ["GOLDEN_PARALLEL", "key", "modes_at", "parallel_table", "real_checkpoints"]

GOLDEN_PARALLEL = Path(__file__).parents[1] / "serve" / "golden_parallel.json"
SIZES = tuple(Parallel(tensor=tensor, pipeline=pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2))
UNQUANTIZED = "_base"


def real_checkpoints(folder: Path) -> list[Path]:
    """Those that somebody else wrote, in `checkpoints/` of the shared folder, by name."""
    return [path.parent for path in sorted(folder.glob("*/golden.npz")) if path.parent.name != UNQUANTIZED]


def key(parallel: Parallel) -> str:
    """As the table names sizes."""
    return f"tp{parallel.tensor} pp{parallel.pipeline}"


def parallel_table(folder: Path, engine: str = DEFAULT_ENGINE) -> dict[str, Any]:
    """The table, as one capability set has it."""
    return {
        directory.name: {key(parallel): modes_at(open_checkpoint(directory), parallel, engine) for parallel in SIZES}
        for directory in real_checkpoints(folder)
    }


def modes_at(checkpoint: Checkpoint, parallel: Parallel, engine: str) -> dict[str, Any]:
    """Native modules by mode, dequantized ones, and what `strict` makes of it."""
    plan = checkpoint.plan("tensorrt_llm", engine=engine, parallel=parallel)
    modes = Counter(module.delivered_mode for module in plan.modules if module.weight is not None)
    dequantized = modes.pop("dequantized", 0)
    try:
        checkpoint.plan("tensorrt_llm", engine=engine, parallel=parallel, strict=True)
    except PlanError:
        strict = "refused"
    else:
        strict = "planned"
    return {"native": dict(sorted(modes.items())), "dequantized": dequantized, "strict": strict}


def text(table: dict[str, Any]) -> str:
    """JSON with one line for each checkpoint and size."""
    blocks = (
        f"{json.dumps(name)}: {{\n    "
        + ",\n    ".join(f"{json.dumps(size)}: {json.dumps(modes)}" for size, modes in sizes.items())
        + "\n  }"
        for name, sizes in table.items()
    )
    return "{\n  " + ",\n  ".join(blocks) + "\n}\n"


if __name__ == "__main__":
    sys.stdout.write(text(parallel_table(Path(sys.argv[1]))))
