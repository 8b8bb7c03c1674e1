"""The tables of docs/json.md list the fields of real documents: every one of them, with its type, and no others."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import fp8_inputs, rewrite, rewrite_config, tiny_config, write_checkpoint
from command_line import run_cli

import trtllm_ct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = Path(__file__).resolve().parents[2] / "docs" / "json.md"
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \|", re.MULTILINE)
KINDS = (
    "inspect",
    "plan",
    "convert",
    "verify",
    "compare",
    pytest.param("generate", marks=pytest.mark.reference),
    pytest.param("perplexity", marks=pytest.mark.reference),
    pytest.param("calibrate", marks=pytest.mark.reference),
    "error",
)

Fields = dict[str, str]
"""Path to type, as documented."""


def documented(kind: str) -> Fields:
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {kind}\n")[1].split("\n## ")[0]
    return dict(ROW.findall(section))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Documents of a kind, made from checkpoints that differ enough to show every field."""
    work = tmp_path_factory.mktemp("json")
    demo = work / "demo"
    shutil.copytree(Path(trtllm_ct.__file__).parent / "cli" / "demo_data", demo)
    # Two native modes, one of them on activations that it leaves alone, one dequantized module and KV-cache scales.
    schemes = {"q_proj": "int4-g128", "k_proj": "int4-g128", "v_proj": "int4-g128"}
    schemes |= {"o_proj": "fp8-tensor-static", "down_proj": "int4-g32"}
    mixed = write_checkpoint(work / "mixed", config=tiny_config(hidden=128), scheme=schemes, kv=True).directory
    rewrite_config(mixed, _quantize_inputs_of_int4)
    damaged = shutil.copytree(mixed, work / "damaged")
    rewrite(damaged, lambda tensors: tensors.pop("model.norm.weight"))
    changed = work / "changed"

    def run(*arguments: object) -> dict[str, Any]:
        return run_cli(*arguments, "--json").document

    def make(kind: str) -> list[dict[str, Any]]:
        match kind:
            case "inspect":
                rounded = run("inspect", mixed, "--requantize", "linears=fp8")
                others = [run("inspect", path) for path in (mixed, damaged)]
                return [run("inspect", demo, "--elsewhere"), rounded, *others]
            case "plan":
                targets = ("modelopt", "dense", "reference")
                rounded = run("plan", mixed, "--requantize", "linears=fp8")
                return [rounded, *(run("plan", path, "--to", target) for path in (demo, mixed) for target in targets)]
            case "convert":
                return [
                    run("convert", mixed, work / f"out-{target}", "--to", target) for target in ("modelopt", "dense")
                ]
            case "verify":
                run_cli("convert", mixed, changed, "--to", "modelopt")
                run_cli("convert", mixed, work / "rounded", "--requantize", "linears=fp8")
                good = [run("verify", mixed), run("verify", mixed, changed), run("verify", mixed, work / "rounded")]
                rewrite(changed, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
                return [*good, run("verify", mixed, changed)]
            case "compare":
                run_cli("convert", mixed, changed, "--overwrite")
                rewrite(changed, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
                broken = shutil.copytree(changed, work / "broken")
                rewrite(broken, lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight_scale"))
                return [run("compare", mixed, demo), *(run("compare", mixed, other) for other in (changed, broken))]
            case "perplexity" | "calibrate":
                (work / "text").write_text("The import statement of a module. " * 4)
                out = [work / "scales"] if kind == "calibrate" else []
                return [run(kind, demo, *out, "--text", work / "text", "--max-tokens", 8)]
            case "generate":
                return [run("generate", demo, "--prompt", "The import statement", "--max-tokens", 2)]
            case _:
                return [run("plan", damaged, "--to", "modelopt"), run("convert", demo, demo, "--to", "dense")]

    return make


def _quantize_inputs_of_int4(config: dict[str, Any]) -> None:
    for group in config["quantization_config"]["config_groups"].values():
        if group["weights"]["num_bits"] == 4:
            group["input_activations"] = fp8_inputs("token")


def type_name(value: object) -> str:
    """The type as the tables spell it; an empty array is any array."""
    if isinstance(value, list):
        return "array of " + " or ".join(sorted({type_name(item) for item in value})) if value else "array"
    names = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", type(None): "null"}
    return names[type(value)]


def allowed(found: str, documented_type: str) -> bool:
    types = documented_type.removesuffix(", optional").split(" or ")
    if found == "array":
        return any(entry.startswith("array of") for entry in types)
    return found in types or (found == "integer" and "number" in types)


def walk(value: dict[str, Any], fields: Fields, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every path in an object with its value; keys that `fields` leaves open come under their placeholder."""
    open_key = next((path for path in fields if re.fullmatch(re.escape(prefix) + "<[^.]+>", path)), None)
    assert children(fields, prefix) <= {prefix + key for key in value}, f"required fields are missing at {prefix!r}"
    for key, item in value.items():
        path = open_key or prefix + key
        yield path, item
        # What the engine is told is described once, under plan.
        if isinstance(item, dict) and (path != "quantization" or "quantization.quant_algo" in fields):
            yield from walk(item, fields, f"{path}.")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            for entry in item:
                yield from walk(entry, fields, f"{path}[].")


def children(fields: Fields, prefix: str) -> set[str]:
    """Documented fields of the object at `prefix` that must be there."""
    direct = re.compile(re.escape(prefix) + r"[^.\[<]+")
    return {path for path, kind in fields.items() if direct.fullmatch(path) and not kind.endswith("optional")}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_the_documented_fields(kind: str, documents: Callable[[str], list[dict[str, Any]]]) -> None:
    fields = documented(kind)
    seen = set()
    for document in documents(kind):
        assert (document.pop("schema"), document.pop("kind")) == (1, kind)
        for path, value in walk(document, fields):
            assert path in fields, f"{path} is not documented"
            assert allowed(type_name(value), fields[path]), f"{path} is {type_name(value)}, not {fields[path]}"
            seen.add(path)
    assert seen == fields.keys(), "fields that no document has"
