"""Write the table of popular recipes into README.md: what `trtllm-ct plan` says about a tiny checkpoint of each.

A recipe is served natively by a release on a GPU if the plan for both keeps the codes of all quantized modules. Factors
compare the bytes of these modules in the engine with those on disk.

    python docs/generate_recipes.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from builders import tiny_config, write_checkpoint  # noqa: E402
from command_line import run_cli  # noqa: E402

from trtllm_ct.engine.platform import SMS  # noqa: E402
from trtllm_ct.engine.releases import RELEASES  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

README = ROOT / "README.md"
BEGIN, END = "<!-- recipes: begin -->", "<!-- recipes: end -->"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A row: its title, the scheme of the test builders, and what `plan` is asked for besides release and GPU."""

    title: str
    scheme: str
    experts: bool = False
    options: tuple[str, ...] = ()


RECIPES = (
    Recipe(title="W4A16, int4 in groups of 128", scheme="int4-g128"),
    Recipe(title="W8A8, int8", scheme="w8a8"),
    Recipe(title="FP8 dynamic", scheme="fp8-channel-token"),
    Recipe(title="FP8 in blocks of 128x128", scheme="fp8-block"),
    Recipe(title="NVFP4", scheme="nvfp4"),
    Recipe(
        title="experts in int4, groups of 32",
        scheme="int4-g32",
        experts=True,
        options=("--requantize", "experts=fp8-block"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a plan says about the quantized modules: their modes, and their bytes in the engine for one on disk.

    `deviates` says whether activations are computed otherwise than the scheme says, `native` whether the codes of all
    modules are kept and nothing prevents that the engine loads them.
    """

    modes: tuple[str, ...]
    factor: float
    deviates: bool
    native: bool

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Outcome:
        """Read the document of `plan --json`."""
        modules = [module for module in document["modules"] if "scheme" in module]
        modes = sorted({module["mode"].split()[0] for module in modules})
        stored, delivered = (sum(module[f"{kind}_bytes"] for module in modules) for kind in ("stored", "delivered"))
        return cls(
            modes=tuple(modes),
            factor=delivered / stored,
            deviates=any("note" in module for module in modules),
            native="dequantized" not in modes and not document["problems"],
        )


def outcomes(recipe: Recipe, folder: Path) -> dict[tuple[str, int], Outcome]:
    """Return what `plan` says for each release and SM about a tiny checkpoint, which is written to a folder."""
    sizes = {"hidden": 256, "intermediate": 512, "layers": 1}
    if recipe.experts:
        config = tiny_config("Qwen3MoeForCausalLM", **sizes, moe_intermediate_size=256)
        write_checkpoint(folder, config=config, scheme=dict.fromkeys(PROJECTIONS, recipe.scheme))
    else:
        write_checkpoint(folder, config=tiny_config(**sizes), scheme=recipe.scheme)
    names = [release.name for release in RELEASES]
    return {(engine, sm): planned(folder, engine, sm, recipe.options) for engine in names for sm in SMS}


def planned(folder: Path, engine: str, sm: int, options: Sequence[str]) -> Outcome:
    """Return what `plan` says for one release and SM."""
    done = run_cli("plan", folder, "--engine", engine, "--sm", sm, *options, "--json")
    if done.code:
        raise ValueError(done.err)
    return Outcome.of(done.document)


def row(recipe: Recipe, folder: Path) -> str:
    """Return the row of a recipe."""
    found = outcomes(recipe, folder)
    plain = planned(folder, *next(iter(found)), ()) if recipe.options else None
    native = {place: outcome for place, outcome in found.items() if outcome.native}
    lost = [outcome for outcome in (*found.values(), *([plain] if plain else [])) if not outcome.native]
    modes = dict.fromkeys(mode for outcome in native.values() for mode in outcome.modes)
    star = "*" * any(outcome.deviates for outcome in native.values())
    answer = f"`{' '.join(recipe.options)}`" if recipe.options else "weights only" if star else "yes"
    cells = (
        recipe.title,
        f"{answer}: {', '.join(f'`{mode}`' for mode in modes)}{star}",
        places(list(native)),
        factors(list(native.values())),
        factors(lost) if lost else "-",
    )
    return f"| {' | '.join(cells)} |\n"


def places(served: Sequence[tuple[str, int]]) -> str:
    """Return versions and SMs as a text; versions with the same SMs stand together."""
    versions: dict[tuple[int, ...], list[str]] = {}
    for release in RELEASES:
        sms = tuple(sm for engine, sm in served if engine == release.name)
        versions.setdefault(sms, []).extend(release.versions)
    if list(versions) == [SMS]:
        return "all"
    parts = (
        f"{'all' if len(versions) == 1 else ', '.join(names)}: {'all' if sms == SMS else ', '.join(map(str, sms))}"
        for sms, names in versions.items()
        if sms
    )
    return "; ".join(parts)


def factors(found: Sequence[Outcome]) -> str:
    """Return the factors of several plans as a text, to one decimal."""
    return " to ".join(sorted({f"{outcome.factor:.1f}" for outcome in found}))


def table() -> str:
    """Return the table of all recipes."""
    head = "| recipe | native? | release: SM | memory | where dequantized |\n| --- | --- | --- | --- | --- |\n"
    with TemporaryDirectory() as work:
        return head + "".join(row(recipe, Path(work) / recipe.scheme) for recipe in RECIPES)


def content() -> str:
    """Return the expected text of README.md."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(content(), encoding="utf-8")
