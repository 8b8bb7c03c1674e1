"""Draw the pictures of docs/report-page.md: pages of `inspect`, `verify` and `compare` in a headless Chromium.

The checkpoints are the one of the demo, and the headers of two larger models, whose payload is never written.

    python docs/generate_report_page.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from browser import Browser, find_browser  # noqa: E402
from hybrid_shape import HybridShape  # noqa: E402

from benchmarks.kimi import write_sparse_file  # noqa: E402
from trtllm_ct import Model, inspect_checkpoint  # noqa: E402
from trtllm_ct.base.dtypes import DType  # noqa: E402
from trtllm_ct.base.schemes import TensorSpec  # noqa: E402
from trtllm_ct.cli.page.pages import comparison_page, inspection_page, verification_page  # noqa: E402
from trtllm_ct.convert.convert import convert_checkpoint  # noqa: E402
from trtllm_ct.plan.models.places import PLACES  # noqa: E402
from trtllm_ct.verify.compare import compare_directories  # noqa: E402
from trtllm_ct.verify.verify import verify_checkpoint  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

PICTURES = ROOT / "docs" / "report-page"
DEMO = ROOT / "trtllm_ct" / "cli" / "demo_data"
LARGEST = 300_000
"""The most bytes of a picture."""

FP8_BLOCKS = {
    "targets": ["re:.*experts.*"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    "format": "float-quantized",
}
INT4 = {
    "targets": ["re:.*self_attn.*_proj"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    "format": "pack-quantized",
}
MIXTURE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "version": "0.14.0",
        "format": "mixed-precision",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": FP8_BLOCKS, "group_1": INT4},
    },
}


def main() -> None:
    """Draw all pictures."""
    if find_browser() is None:
        sys.exit("Install Chromium first.")
    PICTURES.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder, Browser(Path(folder) / "profile") as browser:
        work = Path(folder)
        draw(browser, work, "demo", inspect_page(DEMO), height=1250)
        (work / "mixed").mkdir()
        HybridShape().write(work / "mixed")
        mixed = inspect_page(work / "mixed", shown="mixed", engine="stock-1.3")
        draw(browser, work, "60-layers", mixed, height=1500, focus="mlp.experts.*.down_proj")
        (work / "mixture").mkdir()
        write_mixture(work / "mixture")
        mixture = inspect_page(work / "mixture", shown="mixture", compare_places=True)
        draw(browser, work, "128-experts", mixture, height=1000, focus="self_attn.o_proj")
        draw(browser, work, "gpus", mixture, height=1050, scheme="dark", top="per-gpu")
        convert_checkpoint(DEMO, work / "out")
        report = verify_checkpoint(DEMO, work / "out")
        document = {**report.to_dict(), "directory": "demo", "converted": "out"}
        page = verification_page(report, document).replace(str(work / "out"), "OUT").replace(str(DEMO), "DIR")
        draw(browser, work, "verify", page, height=850, focus="self_attn.q_proj")
        convert_checkpoint(DEMO, work / "dense", to="dense")
        compared = compare_directories(DEMO, work / "dense")
        page = comparison_page(compared, {**compared.to_dict(), "first": "demo", "second": "dense"})
        draw(browser, work, "compare", page, height=750, focus="self_attn.q_proj")


def inspect_page(directory: Path, shown: str = "demo", **options: Any) -> str:
    """Return the page of an inspection, with a short name in place of the path."""
    found = inspect_checkpoint(directory, **options)
    return inspection_page(found, {**found.to_dict(), "directory": shown})


def draw(
    browser: Browser,
    work: Path,
    name: str,
    page: str,
    *,
    height: int,
    scheme: str = "light",
    focus: str = "",
    top: str = "",
) -> None:
    """Write the picture of a page, with the focus on the third cell of a column of its map, from a heading on."""
    file = work / f"{name}.html"
    file.write_text(page, encoding="utf-8")
    browser.open(file, height=height, scheme=scheme)
    if focus:
        columns = "[...document.querySelector('table.map').tHead.rows[0].cells].map((cell) => cell.textContent)"
        row = "document.querySelector('table.map').tBodies[0].rows[2]"
        browser.run(f"{row}.cells[{columns}.indexOf('{focus}')].focus({{preventScroll: true}})")
    if top:
        browser.run(f"document.getElementById('{top}').scrollIntoView({{behavior: 'instant'}})")
    picture = PICTURES / f"{name}.png"
    browser.screenshot(picture)
    size = picture.stat().st_size
    print(f"{picture.relative_to(ROOT)}: {size} bytes, page: {len(page)} characters")
    assert size < LARGEST  # noqa: S101


def write_mixture(directory: Path) -> None:
    """Write the headers of 48 layers with 128 experts: experts in FP8 blocks, attention in int4 groups."""
    specs = dict(tensors())
    write_sparse_file(directory / "model.safetensors", specs)
    (directory / "config.json").write_text(json.dumps(MIXTURE), encoding="utf-8")


def tensors() -> Iterator[tuple[str, TensorSpec]]:
    """Yield the names and specs of all tensors."""
    for module, stated in Model.from_config(MIXTURE).stated_modules(PLACES[0]):
        if ".experts." in module:
            rows, columns = stated.shape
            yield f"{module}.weight", TensorSpec(DType.F8_E4M3, (rows, columns))
            yield f"{module}.weight_scale", TensorSpec(DType.BF16, (rows // 128, columns // 128))
        elif ".self_attn." in module and module.endswith("_proj"):
            rows, columns = stated.shape
            yield f"{module}.weight_packed", TensorSpec(DType.I32, (rows, columns // 8))
            yield f"{module}.weight_scale", TensorSpec(DType.BF16, (rows, columns // 128))
            yield f"{module}.weight_shape", TensorSpec(DType.I64, (2,))
        else:
            yield f"{module}.weight", TensorSpec(DType.BF16, stated.shape)


if __name__ == "__main__":
    main()
