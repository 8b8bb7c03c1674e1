"""Write docs/why.md: what stock TensorRT-LLM makes of real checkpoints, and what it makes of them with this package.

Every cell is a load of a checkpoint on the double of TensorRT-LLM (tests/engine_double), which needs no GPU, and a
comparison of logits with the checkpoint's golden ones. The argument is the folder of real checkpoints that the tests
marked `shared` use.

    python docs/generate_why.py FOLDER           writes the page
    python docs/generate_why.py FOLDER --check   fails when the page is not what would be written
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
"""Generations of the double: how the page calls them, and their capability set."""
RIGHT = 2e-3
"""Logits this near to the golden ones, in their standard deviations, are right."""
BINDINGS = ("trtllm_ct.serve.bindings",)
WIDTH = 80

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One load: `error` in standard deviations of the golden logits, or the `refusal`; `note` explains an error."""

    error: float | None = None
    refusal: str = ""
    note: str = ""

    @property
    def right(self) -> bool:
        """Whether it loads, and nothing of the weights is lost."""
        return self.error is not None and self.error < RIGHT

    @property
    def cell(self) -> str:
        """As the page shows it."""
        if self.error is None:
            return self.refusal
        return "right" if self.right else f"off by {self.error:.1g}{self.note}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One checkpoint: outcomes by generation without and with this package, and the modes that it gets."""

    directory: Path
    stock: Mapping[str, Outcome]
    ours: Mapping[str, Outcome]

    @property
    def cells(self) -> Row:
        """Its row."""
        outcomes = (side[generation].cell for generation in RELEASES for side in (self.stock, self.ours))
        return (f"`{self.directory.name}`", *outcomes, modes_of(self.directory))


def compare(directory: Path) -> Comparison:
    """Load a checkpoint four times."""
    return Comparison(
        directory=directory,
        stock={generation: stock(directory, generation) for generation in RELEASES},
        ours={generation: ours(directory, generation) for generation in RELEASES},
    )


def stock(directory: Path, generation: str) -> Outcome:
    """A release by itself: whatever it raises is an outcome."""
    golden = golden_of(directory)
    with engine_double.installed(generation) as engine:
        try:
            llm = engine.LLM(model=directory, skip_tokenizer_init=True)
        except Exception as error:  # noqa: BLE001 (see above)
            return Outcome(refusal=f"`{type(error).__name__}: {first_line(str(error))}`")
        with llm:
            return Outcome(error=golden.error(llm.logits(golden.prompt)))


def ours(directory: Path, generation: str) -> Outcome:
    """The same release with this package, which must load every one of them."""
    golden = golden_of(directory)
    with (
        engine_double.installed(generation, importers=BINDINGS),
        trtllm_ct.LLM(directory, engine="tensorrt_llm", skip_tokenizer_init=True) as llm,
    ):
        logits = llm.logits(golden.prompt)
    return Outcome(error=golden.error(logits), note=reason(directory, logits))


def reason(directory: Path, logits: Tensor) -> str:
    """Why logits differ from the golden ones."""
    if directory.name == STATIC_FP8 and engine_answers(directory).error(logits) < RIGHT:
        return ", all of it by the engine's own rounding of joined FP8 weights"
    return " by rounding to bfloat16" if "dequantized" in modes_of(directory) else ""


def first_line(message: str) -> str:
    """As much of a message as a table can bear, without the documents that some quote."""
    line = message.partition("\n")[0].partition("{")[0].rstrip(" :").replace("|", "\\|")
    return line if len(line) <= WIDTH else f"{line[:WIDTH].rpartition(' ')[0]} ..."


def modes_of(directory: Path) -> str:
    """How many quantized modules the newest release serves in which mode."""
    plan = open_checkpoint(directory).plan("tensorrt_llm", engine=RELEASES["newest"][1])
    modes = Counter(module.delivered_mode for module in plan.modules if module.weight is not None)
    return ", ".join(f"{count} {_code(mode)}" for mode, count in modes.items()) or "none is quantized"


def _code(mode: str) -> str:
    return mode if mode == "dequantized" else f"`{mode}`"


def table(comparisons: Sequence[Comparison]) -> str:
    """A Markdown table."""
    sides = (f"{side} {release}" for release, _ in RELEASES.values() for side in ("stock", "with trtllm-ct on"))
    header = ("checkpoint", *sides, "modules with trtllm-ct")
    lines = [header, tuple("---" for _ in header), *(comparison.cells for comparison in comparisons)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def summary(comparisons: Sequence[Comparison]) -> str:
    """How many load, and how many of those are right."""
    lines = []
    for generation, (release, _) in RELEASES.items():
        for name, outcomes in (
            ("Stock", [comparison.stock[generation] for comparison in comparisons]),
            ("With trtllm-ct", [comparison.ours[generation] for comparison in comparisons]),
        ):
            loaded = [outcome for outcome in outcomes if outcome.error is not None]
            worst = max((outcome.error or 0 for outcome in loaded), default=0)
            right = sum(outcome.right for outcome in loaded)
            off = f"; the others are off by {worst:.1g} at most" if right < len(loaded) else ""
            lines.append(f"- {name}, {release}: {len(loaded)} of {len(outcomes)} load, {right} of them right{off}.\n")
    return "".join(lines)


def page(comparisons: Sequence[Comparison]) -> str:
    """docs/why.md."""
    return f"""# Why

Sixteen checkpoints that llm-compressor and compressed-tensors wrote, loaded by TensorRT-LLM's PyTorch backend without \
this package and with it.

{summary(comparisons)}
{table(comparisons)}
## How to read it

- `right`: logits at the last eight positions of a prompt are within {RIGHT} of those of the stored weights.
- `off by`: the largest difference of a logit; the unit of all differences is the standard deviation of the logits.
- The stored weights' logits are those of a transformers model in float32, with every weight dequantized in float32 \
from the codes in the files; neither activations nor the KV cache are quantized.
- Anything else is what loading raises.
- `AssertionError: weight` means that a Linear found none of its tensors: they have the names of compressed-tensors.
- One GPU is assumed; more of them change modes where a slice is no whole number of groups or blocks.

## How it was made

TensorRT-LLM needs a GPU, and none was used: `tests/engine_double` imitates from its source what it does with a \
checkpoint between `LLM(...)` and logits, in two generations, and computes in float32.
The double loads the directories that ModelOpt exports and stock serves, and refuses those that stock refuses.
`docs/generate_why.py` writes this page, and a test holds it to what the script would write.
"""


def generate(folder: Path) -> str:
    """The page of all checkpoints in a folder; sidecars go to a place that is deleted."""
    with TemporaryDirectory() as cache:
        os.environ["TRTLLM_CT_CACHE"] = cache
        return page([compare(directory) for directory in real_checkpoints(folder)])


def main() -> None:
    """Write, or with `--check` only compare."""
    text = generate(Path(sys.argv[1]))
    if "--check" in sys.argv[2:]:
        there = PAGE.read_text("utf-8") if PAGE.is_file() else ""
        sys.exit(0 if there == text else "docs/why.md is not what the script writes. Run: python docs/generate_why.py")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
