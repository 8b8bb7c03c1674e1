"""Write docs/why.md: how TensorRT-LLM loads real checkpoints, without this package and with it.

For every result, the script loads a checkpoint with the double of TensorRT-LLM (tests/engine_double), which needs no
GPU, and compares the logits with the checkpoint's golden logits. The argument is the folder of real checkpoints that
the tests marked `shared` use.

    python docs/generate_why.py FOLDER           writes the page
    python docs/generate_why.py FOLDER --check   fails if the page is not up to date
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "support")]

import engine_double  # noqa: E402
from fp8_oracle import STATIC_FP8, engine_answers  # noqa: E402
from golden_parallel import real_checkpoints  # noqa: E402
from plain_model import golden_of  # noqa: E402

import trtllm_ct  # noqa: E402
from trtllm_ct import open_checkpoint  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

PAGE = ROOT / "docs" / "why.md"
RELEASES: Mapping[str, tuple[str, str]] = {
    "old": ("1.0 and 1.1", "stock-1.0"),
    "newest": ("main of September 2026", "stock-1.3"),
}
"""The generations of the double: the name of each release on the page, and its capability set."""
RIGHT = 2e-3
"""Logits are right if they differ by less than this from the golden logits, in standard deviations of these."""
BINDINGS = ("trtllm_ct.serve.bindings",)
MAX_MESSAGE_WIDTH = 80

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of loading one checkpoint.

    `error` is the largest error of the logits, in standard deviations of the golden logits; None if loading failed.
    `refusal` is then the text of the exception. `note` explains an error.
    """

    error: float | None = None
    refusal: str = ""
    note: str = ""

    @property
    def right(self) -> bool:
        """Whether the checkpoint loads and its logits are right."""
        return self.error is not None and self.error < RIGHT

    @property
    def cell(self) -> str:
        """The text of the table cell."""
        if self.error is None:
            return self.refusal
        return "right" if self.right else f"off by {self.error:.1g}{self.note}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The outcomes of one checkpoint by generation: `stock` without this package, `with_package` with it."""

    directory: Path
    stock: Mapping[str, Outcome]
    with_package: Mapping[str, Outcome]

    @property
    def cells(self) -> Row:
        """The checkpoint's row of the table."""
        outcomes = (side[generation].cell for generation in RELEASES for side in (self.stock, self.with_package))
        return (f"`{self.directory.name}`", *outcomes, modes_of(self.directory))


def compare(directory: Path) -> Comparison:
    """Load a checkpoint four times: with each generation, without and with this package."""
    return Comparison(
        directory=directory,
        stock={generation: load_stock(directory, generation) for generation in RELEASES},
        with_package={generation: load_with_package(directory, generation) for generation in RELEASES},
    )


def load_stock(directory: Path, generation: str) -> Outcome:
    """Load a checkpoint without this package; any exception is an outcome."""
    golden = golden_of(directory)
    with engine_double.installed(generation) as engine:
        try:
            llm = engine.LLM(model=directory, skip_tokenizer_init=True)
        except Exception as error:  # noqa: BLE001 (any exception is an outcome)
            return Outcome(refusal=f"`{type(error).__name__}: {first_line(str(error))}`")
        with llm:
            return Outcome(error=golden.error(llm.logits(golden.prompt)))


def load_with_package(directory: Path, generation: str) -> Outcome:
    """Load a checkpoint with this package; an exception ends the script, since every checkpoint must load."""
    golden = golden_of(directory)
    with (
        engine_double.installed(generation, importers=BINDINGS),
        trtllm_ct.LLM(directory, engine="tensorrt_llm", skip_tokenizer_init=True) as llm,
    ):
        logits = llm.logits(golden.prompt)
    return Outcome(error=golden.error(logits), note=error_note(directory, logits))


def error_note(directory: Path, logits: Tensor) -> str:
    """Why the logits differ from the golden logits, if they do; empty if no reason is known."""
    if directory.name == STATIC_FP8 and engine_answers(directory).error(logits) < RIGHT:
        return ", all of it from the engine's own rounding of fused FP8 weights"
    return ", from rounding to bfloat16" if "dequantized" in modes_of(directory) else ""


def first_line(message: str) -> str:
    """The first line of a message, shortened to 80 characters and without the JSON that some messages quote."""
    line = message.partition("\n")[0].partition("{")[0].rstrip(" :").replace("|", "\\|")
    return line if len(line) <= MAX_MESSAGE_WIDTH else f"{line[:MAX_MESSAGE_WIDTH].rpartition(' ')[0]} ..."


def modes_of(directory: Path) -> str:
    """The number of modules by the mode in which the newest release serves them, for all quantized modules."""
    plan = open_checkpoint(directory).plan("tensorrt_llm", engine=RELEASES["newest"][1])
    modes = Counter(module.delivered_mode for module in plan.modules if module.weight is not None)
    return ", ".join(f"{count} {_code(mode)}" for mode, count in modes.items()) or "none is quantized"


def _code(mode: str) -> str:
    return mode if mode == "dequantized" else f"`{mode}`"


def table(comparisons: Sequence[Comparison]) -> str:
    """The Markdown table of all checkpoints."""
    sides = (f"{side} {release}" for release, _ in RELEASES.values() for side in ("stock", "with trtllm-ct on"))
    header = ("checkpoint", *sides, "modules with trtllm-ct")
    lines = [header, tuple("---" for _ in header), *(comparison.cells for comparison in comparisons)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def summary(comparisons: Sequence[Comparison]) -> str:
    """Count the checkpoints that load and the checkpoints that are right, as a Markdown list."""
    lines = []
    for generation, (release, _) in RELEASES.items():
        for name, outcomes in (
            ("Stock", [comparison.stock[generation] for comparison in comparisons]),
            ("With trtllm-ct", [comparison.with_package[generation] for comparison in comparisons]),
        ):
            loaded = [outcome for outcome in outcomes if outcome.error is not None]
            worst = max((outcome.error or 0 for outcome in loaded), default=0)
            right = sum(outcome.right for outcome in loaded)
            off = f"; the others are off by {worst:.1g} at most" if right < len(loaded) else ""
            lines.append(f"- {name}, {release}: {len(loaded)} of {len(outcomes)} load, {right} are right{off}.\n")
    return "".join(lines)


def page(comparisons: Sequence[Comparison]) -> str:
    """The text of docs/why.md."""
    return f"""# Why

This page shows what happens when TensorRT-LLM's PyTorch backend loads sixteen checkpoints that llm-compressor and \
compressed-tensors wrote, first without this package and then with it.

{summary(comparisons)}
{table(comparisons)}
## How to read it

- `right`: the logits at the last eight positions of a prompt differ by less than {RIGHT} from the reference logits.
- `off by`: the largest difference of a logit from its reference logit.
- The unit of all differences is the standard deviation of the reference logits.
- The reference logits come from a transformers model in float32.
- Every weight of it is dequantized in float32 from the codes in the files; neither activations nor the KV cache are \
quantized.
- Any other cell is the error that loading raises.
- `AssertionError: weight` means that a Linear found none of its tensors, because they have the names of \
compressed-tensors.
- All results are for one GPU.
- With tensor parallelism, the mode of a module can change where its slice is not a whole number of groups or blocks.

## How it was made

TensorRT-LLM needs a GPU, but none was used here.
Instead, `tests/engine_double` imitates TensorRT-LLM: it does what the source code of two releases does with a \
checkpoint between `LLM(...)` and the logits, and computes in float32.
The double loads the ModelOpt exports that stock TensorRT-LLM serves, and refuses the directories that stock refuses.
The figures were made on a CPU, with the packages that `constraints.txt` pins: {pinned_versions()}.
`docs/generate_why.py` writes this page, and a test checks that the page is up to date.
"""


def pinned_versions() -> str:
    """The packages that constraints.txt pins, with their releases."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return ", ".join(line.replace("==", " ") for line in lines if "==" in line)


def generate(folder: Path) -> str:
    """Compare all checkpoints in a folder and return the page; sidecars go to a temporary directory."""
    with TemporaryDirectory() as cache:
        os.environ["TRTLLM_CT_CACHE"] = cache
        return page([compare(directory) for directory in real_checkpoints(folder)])


def main() -> None:
    """Write the page, or with `--check` only compare it."""
    text = generate(Path(sys.argv[1]))
    if "--check" in sys.argv[2:]:
        existing = PAGE.read_text("utf-8") if PAGE.is_file() else ""
        sys.exit(
            0 if existing == text else "docs/why.md is not what the script writes. Run: python docs/generate_why.py"
        )
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
