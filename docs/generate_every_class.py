"""Write docs/every-class.md from docs/every-class.json, the outcomes of tests/end_to_end/test_any_model.py.

The page has the command that writes the outcomes.

    python docs/generate_every_class.py           writes the page
    python docs/generate_every_class.py --check   fails if the page is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

FOLDER = Path(__file__).resolve().parent
OUTCOMES = FOLDER / "every-class.json"
PAGE = FOLDER / "every-class.md"
COMMAND = "pytest -q tests/end_to_end/test_any_model.py --every-class --tally docs/every-class.json"

RESULTS: Mapping[str, tuple[str, str]] = {
    "exact": ("exact", "transformers loads the plain weights without a missing or unexpected key, bit for bit"),
    "copied": ("copied", "the class has no Linear that the library quantizes; its tensors are copied bit for bit"),
    "inspect": ("refused", "`inspect` names what is wrong with the files"),
    "refused": ("refused", "the conversion names what is wrong with the files"),
    "verify": ("failed", "`verify` found a fault in the conversion"),
    "loading": ("failed", "transformers misses tensors of the conversion, or doesn't know them"),
    "values": ("failed", "the loaded model has other values"),
    "not built": ("not built", "transformers builds no model of the class from small sizes"),
    "not saved": ("not saved", "`save_pretrained` of the class fails for the quantized model"),
}
"""The results of a test: their group, and what they mean."""
GROUPS = tuple(dict.fromkeys(group for group, _ in RESULTS.values()))


class Outcome(NamedTuple):
    """What became of the model of one class, quantized by one scheme."""

    model_class: str
    scheme: str
    result: str
    why: str

    @property
    def group(self) -> str:
        """The group of its result."""
        return RESULTS[self.result][0]


def outcomes_of(document: Mapping[str, Any]) -> Iterator[Outcome]:
    """Yield the outcomes by class and scheme."""
    for name, of_schemes in document["outcomes"].items():
        for scheme, (result, why) in of_schemes.items():
            yield Outcome(name, scheme, result, why)


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines) + "\n"


def counts(outcomes: Iterable[Outcome], classes: frozenset[str]) -> str:
    """Return the table of the number of models by scheme and group; `classes` are those that generate text."""
    by_scheme: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_scheme.setdefault(outcome.scheme, []).append(outcome)
    rows = []
    for scheme, members in sorted(by_scheme.items()):
        tried = [outcome.model_class for outcome in members]
        numbers = [sum(outcome.group == group for outcome in members) for group in GROUPS]
        others = len(set(tried) - classes)
        rows.append((f"`{scheme}`", str(len(tried)), str(others), *map(str, numbers)))
    return table(("scheme", "classes tried", "of these, of other kinds", *GROUPS), rows)


def reasons(outcomes: Iterable[Outcome]) -> str:
    """Return the table of all outcomes but exact ones, with the reason; schemes with one reason share a row."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.group != "exact":
            together.setdefault((outcome.model_class, outcome.result, outcome.why), []).append(outcome.scheme)
    rows = [
        (f"`{name}`", ", ".join(f"`{scheme}`" for scheme in schemes), RESULTS[result][0], literal(why))
        for (name, result, why), schemes in sorted(together.items())
    ]
    return table(("class", "schemes", "outcome", "why"), rows)


def literal(text: str) -> str:
    """Return a message as Markdown shows it literally."""
    return f"`{text.replace('`', chr(39))}`"


def page(document: Mapping[str, Any]) -> str:
    """Return the text of docs/every-class.md."""
    outcomes = list(outcomes_of(document))
    classes = frozenset(document["classes"])
    left = sorted(classes - {outcome.model_class for outcome in outcomes})
    exact = sorted({entry.model_class for entry in outcomes} - {e.model_class for e in outcomes if e.group != "exact"})
    packages = " and ".join(f"{name} {release}" for name, release in document["packages"].items())
    meanings = "".join(f"- {group}: {meaning}.\n" for group, meaning in RESULTS.values())
    untried = ", ".join(f"`{name}`" for name in left) or "none"
    return f"""# Every class of transformers

This page shows what becomes of a tiny model of every class of transformers that generates text, from text alone or \
from images too.
Each model has random weights and small sizes.
The library quantizes it without data, it goes through `inspect`, `convert --to dense` and `verify`, and transformers \
loads the result.
Routed experts are stored one by one, and again in tensors of all experts where the class has such tensors; both must \
be exact.
transformers has {len(classes)} such classes; classes of other kinds are tried too, for what their layers have.

The outcomes are those of {packages}, written by:

```text
{COMMAND}
python docs/generate_every_class.py
```

On a busy machine with two cores, the first command took 16 minutes for `w4a16-g32`.
With `-k` it can be run in parts, since the file keeps what it has.

{counts(outcomes, classes)}
{meanings}
## Outcomes that are not exact

{reasons(outcomes)}
## Exact for every scheme that was tried

{", ".join(f"`{name}`" for name in exact)}.

Not tried: {untried}.
"""


def main() -> None:
    """Write the page, or with `--check` only compare it."""
    text = page(json.loads(OUTCOMES.read_text(encoding="utf-8")))
    if "--check" in sys.argv[1:]:
        existing = PAGE.read_text("utf-8") if PAGE.is_file() else ""
        sys.exit(0 if existing == text else "docs/every-class.md is out of date. Run: make docs")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
