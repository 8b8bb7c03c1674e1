"""Write docs/support-matrix.md, generated from the tables in the code.

The matrix shows what the planner does: for each scheme, this script describes the tensor headers of a tiny model and
plans that model for every target. A scheme that the planner refuses has no row.
A new format needs an entry in `STORED`, and a new way to quantize activations needs an entry in `ACTIVATIONS`. New
engines, modes and architectures are picked up automatically.

    python docs/generate_support_matrix.py           writes the page
    python docs/generate_support_matrix.py --check   fails if the page is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trtllm_ct import Catalog, Model, PlanOptions, make_plan
from trtllm_ct.base.dtypes import DType
from trtllm_ct.base.errors import CheckpointError
from trtllm_ct.base.schemes import CompressionFormat, Element, NumberType, QuantArgs, QuantScheme, Strategy, TensorSpec
from trtllm_ct.checkpoint.catalog import StoredTensor
from trtllm_ct.checkpoint.source import Folder
from trtllm_ct.config.quantization_config import ConfigGroup, QuantizationConfig
from trtllm_ct.engine.holdings import native_mode
from trtllm_ct.engine.model_classes import MODEL_CLASSES, WRAPPERS, has_class
from trtllm_ct.engine.modes import LINEAR_MODES, LinearMode, ScaleForm
from trtllm_ct.engine.releases import DEFAULT_ENGINE, RELEASES
from trtllm_ct.engine.target import ENGINES, REFERENCE, TARGETS
from trtllm_ct.formats import FORMATS
from trtllm_ct.formats.base import scale_shape
from trtllm_ct.formats.sparse.pieces import SPARSE_FORMATS
from trtllm_ct.layouts.packing import packed_words
from trtllm_ct.plan.models.build_classes import BUILD_CLASSES
from trtllm_ct.plan.models.class_rows import CLASS_ROWS, TEXT_MODELS
from trtllm_ct.plan.models.places import PLACES
from trtllm_ct.plan.stored import StoredModule, Whole

if TYPE_CHECKING:
    from trtllm_ct.plan.models.class_row import ClassRow
    from trtllm_ct.plan.models.site import Site

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support-matrix.md"
GROUP_SIZES = (16, 32, 64, 128, 256)
COLUMNS: Mapping[str, PlanOptions] = {name: PlanOptions(to="modelopt", engine=name) for name in ENGINES} | {
    "reference": PlanOptions(to=REFERENCE.name)
}
"""The options of each column: `modelopt` with each capability set, and the reference engine; `dense` has no modes."""

Shape = tuple[int, int]
Specs = Mapping[str, TensorSpec]
Cell = tuple[str, ...]


# The tensors of each format -------------------------------------------------------------------------------------------


def packed_int(args: QuantArgs, shape: Shape) -> Specs:
    """`pack-quantized`: codes packed in int32 words along K; zero points packed along N, or one unpacked int8."""
    specs = {
        "weight_packed": TensorSpec(DType.I32, packed_words(args.num_bits).packed_shape(shape)),
        "weight_scale": TensorSpec(DType.BF16, scale_shape(args, shape)),
        "weight_shape": TensorSpec(DType.I64, (2,)),
    }
    if not args.symmetric and args.strategy is Strategy.TENSOR:
        specs["weight_zero_point"] = TensorSpec(DType.I8, (1,))
    elif not args.symmetric:
        packed = packed_words(args.num_bits, axis=0).packed_shape(scale_shape(args, shape))
        specs["weight_zero_point"] = TensorSpec(DType.I32, packed)
    return specs


def plain_int(args: QuantArgs, shape: Shape) -> Specs:
    """`int-quantized`: one int8 per code."""
    specs = {"weight": TensorSpec(DType.I8, shape), "weight_scale": TensorSpec(DType.BF16, scale_shape(args, shape))}
    if not args.symmetric:
        specs["weight_zero_point"] = TensorSpec(DType.I8, scale_shape(args, shape))
    return specs


def plain_float8(args: QuantArgs, shape: Shape) -> Specs:
    """`float-quantized`: one float8 per code."""
    return {
        "weight": TensorSpec(DType.F8_E4M3, shape),
        "weight_scale": TensorSpec(DType.BF16, scale_shape(args, shape)),
    }


def marlin_24(args: QuantArgs, shape: Shape) -> Specs:
    """`marlin-24`: codes and scales in the layout of one kernel; two of every four columns are stored."""
    rows, columns = shape
    groups = scale_shape(args, shape)[1]
    return {
        "weight_packed": TensorSpec(DType.I32, (columns // 32, rows * args.num_bits // 2)),
        "scale_packed": TensorSpec(DType.F16, (groups, rows)),
        "meta": TensorSpec(DType.I16, (columns // 32, rows * 2)),
    }


def nvfp4(args: QuantArgs, shape: Shape) -> Specs:
    """`nvfp4-pack-quantized`: two codes per byte, float8 scales and a global scale."""
    return {
        "weight_packed": TensorSpec(DType.U8, (shape[0], shape[1] // 2)),
        "weight_scale": TensorSpec(DType.F8_E4M3, scale_shape(args, shape)),
        "weight_global_scale": TensorSpec(DType.F32, (1,)),
    }


def packed_microscaling(args: QuantArgs, shape: Shape) -> Specs:
    """`mxfp4-pack-quantized` and `mxfp6-pack-quantized`: densely packed codes; each scale is one exponent byte."""
    return {
        "weight_packed": TensorSpec(DType.U8, (shape[0], shape[1] * args.num_bits // 8)),
        "weight_scale": TensorSpec(DType.U8, scale_shape(args, shape)),
    }


def mxfp8(args: QuantArgs, shape: Shape) -> Specs:
    """`mxfp8-quantized`: one float8 per code; each scale is one exponent byte."""
    return {"weight": TensorSpec(DType.F8_E4M3, shape), "weight_scale": TensorSpec(DType.U8, scale_shape(args, shape))}


def integers() -> Iterator[QuantArgs]:
    """Yield integers of every width in every granularity, without and with zero points."""
    for bits, symmetric in product(range(1, 9), (True, False)):
        yield from granularities(QuantArgs(num_bits=bits, symmetric=symmetric))


def marlin_integers() -> Iterator[QuantArgs]:
    """Yield the schemes that `marlin-24` files were written for."""
    for bits in (4, 8):
        yield QuantArgs(num_bits=bits, strategy=Strategy.CHANNEL)
        yield QuantArgs(num_bits=bits, strategy=Strategy.GROUP, group_size=128)


def floats8() -> Iterator[QuantArgs]:
    """Yield fp8 in every granularity, including blocks."""
    args = QuantArgs(num_bits=8, type=NumberType.FLOAT)
    yield from granularities(args)
    yield replace(args, strategy=Strategy.BLOCK, block_structure=(128, 128))


def granularities(args: QuantArgs) -> Iterator[QuantArgs]:
    """Yield the arguments with one scale per tensor, per channel and per group of each size."""
    yield replace(args, strategy=Strategy.TENSOR)
    yield replace(args, strategy=Strategy.CHANNEL)
    for size in GROUP_SIZES:
        yield replace(args, strategy=Strategy.GROUP, group_size=size)


def microscaling(bits: int) -> Callable[[], Iterator[QuantArgs]]:
    """Return a function that yields floats of this width in groups of 32."""
    return lambda: iter((_floats(bits, Strategy.GROUP, 32),))


def nvfp4_floats() -> Iterator[QuantArgs]:
    """Yield fp4 in groups of 16 with a global scale."""
    yield _floats(4, Strategy.TENSOR_GROUP, 16)


def _floats(
    bits: int, strategy: Strategy, size: int | None = None, *, dynamic: bool | Literal["local"] = False
) -> QuantArgs:
    return QuantArgs(num_bits=bits, type=NumberType.FLOAT, strategy=strategy, group_size=size, dynamic=dynamic)


ACTIVATIONS: Mapping[str, QuantArgs | None] = {
    "16-bit": None,
    "fp8 static per tensor": _floats(8, Strategy.TENSOR),
    "fp8 dynamic per token": _floats(8, Strategy.TOKEN, dynamic=True),
    "fp8 dynamic per group of 128": _floats(8, Strategy.GROUP, 128, dynamic=True),
    "fp8 dynamic per group of 32": _floats(8, Strategy.GROUP, 32, dynamic=True),
    "fp4 dynamic per group of 32": _floats(4, Strategy.GROUP, 32, dynamic=True),
    "fp4 dynamic per group of 16": _floats(4, Strategy.TENSOR_GROUP, 16, dynamic="local"),
    "int8 dynamic per token": QuantArgs(num_bits=8, strategy=Strategy.TOKEN, dynamic=True),
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One format in the matrix: the arguments of its weights, its tensors, and the activations that it is used with."""

    arguments: Callable[[], Iterator[QuantArgs]]
    tensors: Callable[[QuantArgs, Shape], Specs]
    activations: tuple[str, ...] = ("16-bit",)


_INT_INPUTS = ("16-bit", "int8 dynamic per token", "fp8 dynamic per token")
_FP8_INPUTS = ("16-bit", "fp8 static per tensor", "fp8 dynamic per token", "fp8 dynamic per group of 128")

STORED: Mapping[str, Stored] = {
    "pack-quantized": Stored(integers, packed_int, _INT_INPUTS),
    "marlin-24": Stored(marlin_integers, marlin_24),
    "int-quantized": Stored(integers, plain_int, _INT_INPUTS),
    "float-quantized": Stored(floats8, plain_float8, _FP8_INPUTS),
    "nvfp4-pack-quantized": Stored(nvfp4_floats, nvfp4, ("16-bit", "fp4 dynamic per group of 16")),
    "mxfp4-pack-quantized": Stored(microscaling(4), packed_microscaling, ("16-bit", "fp4 dynamic per group of 32")),
    "mxfp6-pack-quantized": Stored(microscaling(6), packed_microscaling, ("16-bit", "fp8 dynamic per group of 32")),
    "mxfp8-quantized": Stored(microscaling(8), mxfp8, ("16-bit", "fp8 dynamic per group of 32")),
}


# The modes that the planner assigns -----------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 256,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A tiny model, and the module whose mode is shown; compared by identity, so that it can be a key."""

    model: Model
    module: str


LINEAR = Shown(
    Model.from_config({"architectures": ["LlamaForCausalLM"], **_SIZES}),
    "model.layers.0.self_attn.o_proj",  # not fused with other Linears
)
EXPERT = Shown(
    Model.from_config(
        {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 2, "moe_intermediate_size": 256, **_SIZES}
    ),
    "model.layers.0.mlp.experts.0.down_proj",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One scheme in one format, and the mode it gets for each target, in the order of `COLUMNS`."""

    format: str
    args: QuantArgs
    activations: str
    outcomes: Cell

    @property
    def cells(self) -> Cell:
        """The row of the table, including the native modes."""
        zero_points = "no" if self.args.symmetric else "yes"
        description = (self.args.number, zero_points, self.granularity, self.activations, f"`{self.format}`")
        return (*description, self.native_modes, *self.outcomes)

    @property
    def granularity(self) -> str:
        """What has one scale: `tensor`, `channel`, `group 128` or `block 128x128`."""
        if self.args.block_structure is not None:
            return "block {}x{}".format(*self.args.block_structure)
        return f"group {self.args.group_size}" if self.args.group_size else str(self.args.strategy)

    @property
    def native_modes(self) -> str:
        """The mode families of the scheme; int4 can have two, because `recipe.yaml` decides between them."""
        modes = dict.fromkeys(native_mode(self.args, names) for names in ((), ("AWQModifier",)))
        return " or ".join(f"`{mode}`" for mode in modes if mode) or "-"


@cache
def schemes(shown: Shown) -> tuple[Scheme, ...]:
    """Return every scheme that the planner accepts; both files show those of Linears."""
    return tuple(_schemes(shown))


def _schemes(shown: Shown) -> Iterator[Scheme]:
    for weight_format in FORMATS:
        stored = STORED[weight_format.name]
        for args, activations in product(stored.arguments(), stored.activations):
            scheme = QuantScheme(weights=args, input_activations=ACTIVATIONS[activations])
            config, catalog = checkpoint_of(stored, scheme, shown)
            try:
                outcomes = tuple(outcome(config, catalog, options, shown) for options in COLUMNS.values())
            except CheckpointError:
                continue
            yield Scheme(format=weight_format.name, args=args, activations=activations, outcomes=outcomes)


def sites_of(model: Model) -> Iterator[Site]:
    """Yield the sites of a checkpoint that has the modules which config.json states, all of them plain."""
    stored = {
        name: StoredModule(name, {"weight": Whole(name=f"{name}.weight", spec=TensorSpec(DType.BF16, stated.shape))})
        for name, stated in model.stated_modules(PLACES[0])
    }
    return model.in_checkpoint(stored).sites()


def checkpoint_of(stored: Stored, scheme: QuantScheme, shown: Shown) -> tuple[QuantizationConfig, Catalog]:
    """Return the configuration and the tensors of a model whose Linears are all stored by this scheme."""
    if scheme.weights is None:
        raise AssertionError("every scheme of the matrix quantizes weights")
    specs: dict[str, TensorSpec] = {}
    for site in sites_of(shown.model):
        local: dict[str, TensorSpec] = {"weight": TensorSpec(DType.BF16, site.shape)}
        if site.class_name == "Linear" and not site.plain:
            local = {**stored.tensors(scheme.weights, (site.shape[0], site.shape[1])), **of_inputs(scheme)}
        specs |= {f"{site.module}.{name}": spec for name, spec in local.items()}
    tensors = {name: StoredTensor(name=name, spec=spec, file="", offset=0) for name, spec in specs.items()}
    config = QuantizationConfig(groups=(ConfigGroup(name="group_0", targets=("Linear",), scheme=scheme),))
    return config, Catalog(source=Folder(Path()), tensors=tensors, files=())


def outcome(config: QuantizationConfig, catalog: Catalog, options: PlanOptions, shown: Shown) -> str:
    """Return the mode that a Linear of this checkpoint gets; raises `PlanError` if the planner refuses the scheme."""
    module = make_plan(config, catalog, shown.model, options).module(shown.module)
    if module.layer is None:
        return "dequantized"
    return f"`{module.layer.quant_algo}`" + ("*" if module.note else "")


def of_inputs(scheme: QuantScheme) -> Specs:
    """Return the tensors that a scheme stores for its activations."""
    inputs = scheme.input_activations
    if inputs is None or inputs.dynamic is True:
        return {}
    static = inputs.dynamic is False
    name, dtype = ("input_scale", DType.BF16) if static else ("input_global_scale", DType.F32)
    return {name: TensorSpec(dtype, (1,))}


# Tables --------------------------------------------------------------------------------------------------------------


def table(header: Cell, rows: Sequence[Cell]) -> str:
    """Return a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def scheme_table(shown: Shown) -> str:
    """Return the table of schemes; widths, granularities, activations and formats with equal outcomes share a row."""
    rows = [scheme.cells for scheme in schemes(shown)]
    header: Cell = ("weights", "zero points", "one scale per", "activations", "stored as", "native mode")
    for column, join in ((2, folded_sizes), (3, ", ".join), (4, ", ".join), (0, folded_widths), (1, " or ".join)):
        rows = fold(rows, column, join)
    return table(*merge_equal_columns((*header, *(f"`{name}`" for name in COLUMNS)), rows, first=len(header)))


def fold(rows: list[Cell], column: int, join: Callable[[list[str]], str]) -> list[Cell]:
    """Merge rows that differ only in one column."""
    together: dict[Cell, list[str]] = {}
    for row in rows:
        together.setdefault((*row[:column], *row[column + 1 :]), []).append(row[column])
    return [(*rest[:column], join(values), *rest[column:]) for rest, values in together.items()]


def folded_sizes(granularities: list[str]) -> str:
    """Join granularities, with the word `group` only once: `tensor, channel, group 32, 64`."""
    sizes = [entry.removeprefix("group ") for entry in granularities if entry.startswith("group ")]
    others = [entry for entry in granularities if not entry.startswith("group ")]
    return ", ".join([*others, *(["group " + ", ".join(sizes)] if sizes else [])])


def folded_widths(numbers: list[str]) -> str:
    """Join number types; consecutive widths become a range: `int1 to int4`."""
    widths = [int(number[-1]) for number in numbers]
    consecutive = len(numbers) > 1 and widths == list(range(widths[0], widths[0] + len(numbers)))
    return f"{numbers[0]} to {numbers[-1]}" if consecutive else ", ".join(numbers)


def merge_equal_columns(header: Cell, rows: list[Cell], *, first: int) -> tuple[Cell, list[Cell]]:
    """Merge those columns from `first` on that are equal in every row."""
    columns: dict[Cell, list[str]] = {}
    for index in range(first, len(header)):
        columns.setdefault(tuple(row[index] for row in rows), []).append(header[index])
    names = tuple(", ".join(merged) for merged in columns.values())
    bodies = zip(*columns, strict=True)
    return (*header[:first], *names), [(*row[:first], *cells) for row, cells in zip(rows, bodies, strict=True)]


def kv_cache_table() -> str:
    """Return the table of FP8 KV-cache scales: whether each target keeps them."""
    kept = ["carried" if "FP8" in target.capabilities.kv_cache else "left out" for target in TARGETS.values()]
    return table(("KV cache", *(f"`{name}`" for name in TARGETS)), [("fp8 static per tensor", *kept)])


SCALES: Mapping[ScaleForm, str] = {
    ScaleForm.SCALAR: "float32 []",
    ScaleForm.ROW: "float32 [N]",
    ScaleForm.GROUP: "float32 [N, K/g]",
    ScaleForm.BLOCK: "float32 [N/128, K/128]",
    ScaleForm.TWO_LEVEL: "float8_e4m3fn [N, K/16] and float32 []",
    ScaleForm.EXPONENT: "uint8 [N, K/32]",
}


CODES: Mapping[Element, str] = {Element.E2M1: "two fp4 per byte"}
"""The codes of modes without a packing, by element; float8 is the default."""


def mode_table() -> str:
    """Return the table of modes: the tensors of a Linear, and the engines with the mode for Linears and for experts."""
    rows = [
        (
            f"`{mode.algo}`",
            str(mode.packing) if mode.packing else CODES.get(mode.element, "float8_e4m3fn"),
            SCALES[mode.scale],
            ", ".join(str(size) for size in sorted(mode.group_sizes)) or "-",
            "yes" if mode.zero_point else "no",
            mode.activations.value,
            multiples(mode),
            having(mode, expert=False),
            having(mode, expert=True),
        )
        for mode in LINEAR_MODES
    ]
    header = ("mode", "codes", "scale", "group sizes", "zero points", "activations", "sizes", "Linears", "experts")
    return table(header, rows)


def multiples(mode: LinearMode) -> str:
    """Return the numbers that the sizes of a weight must be multiples of."""
    sizes = {"N": mode.row_multiple, "K": mode.column_multiple}
    return ", ".join(f"{axis} % {size}" for axis, size in sizes.items() if size > 1) or "-"


def having(mode: LinearMode, *, expert: bool) -> str:
    """Return the names of the engines that have a mode."""
    return (
        ", ".join(
            f"`{name}`" for name, options in COLUMNS.items() if mode.algo in options.target().algos(expert=expert)
        )
        or "-"
    )


def architectures() -> str:
    """Return the sentences about model classes."""
    names = ", ".join(f"`{name}`" for name in CLASS_ROWS)
    types = ", ".join(f"`{name}`" for name in TEXT_MODELS)
    missing = ", ".join(f"`{name}`" for name in CLASS_ROWS if name not in MODEL_CLASSES)
    return (
        "Target `dense` takes every architecture: modules that no row lists are found in the headers of the files.\n\n"
        f"Architectures with a row about the engine's class: {names}.\n\n"
        f"No release of TensorRT-LLM has a model class for {missing}: convert them with `--to dense`.\n\n"
        f"Text models inside a larger one, by `text_config.model_type`: {types}.\n"
    )


def model_class_table() -> str:
    """Return the table of the engine's model classes that a checkpoint can be converted for, by first release."""
    known = list(dict.fromkeys([*CLASS_ROWS, *WRAPPERS]))
    rows = [
        (f"`{release.name}`", ", ".join(f"`{name}`" for name in known if MODEL_CLASSES.get(name) == release))
        for release in RELEASES
    ]
    return table(("since", "model classes"), rows)


_SLICES = "slices of 1, 2 and 4 ranks"
NO_PROOF: Mapping[str, str] = {
    "Step3p5ForCausalLM": f"{_SLICES}; no logits, since transformers 5.23 has no such class",
}
"""The classes with a row that tests don't cover as they cover all others, with what they show instead."""

PROOF = f"{_SLICES}, logits"
LISTED_PROOF = "weights of every scheme for every release"


def class_row_table() -> str:
    """Return the table of the classes with a row: releases, levels, limits and what tests show."""
    rows = [
        (
            f"`{name}`",
            ", ".join(f"`{release.name}`" for release in RELEASES if has_class(release, name)) or "-",
            targets_of(name),
            limits_of(row),
            NO_PROOF.get(name, LISTED_PROOF if row.leaves else PROOF),
        )
        for name, row in CLASS_ROWS.items()
    ]
    return table(("model class", "releases that have it", "targets", "limits", "shown by tests"), rows)


def targets_of(name: str) -> str:
    """Return the names of the targets that take checkpoints of a class without a problem."""
    names = ("dense",) if name not in MODEL_CLASSES else ("dense", "modelopt", "tensorrt_llm")
    return ", ".join(f"`{target}`" for target in (*names, *(("engine",) if name in BUILD_CLASSES else ())))


def limits_of(row: ClassRow) -> str:
    """Return the Linears that may have some modes only, and these modes."""
    joined = [mode.algo for mode in LINEAR_MODES if mode.class_joins_scales]
    modes = [(limit.paths, limit.algos) for limit in row.limits]
    modes += [(parts, frozenset(joined)) for parts in row.joins.values()]
    limits = [
        f"{', '.join(f'`{path}`' for path in paths)}: " + (", ".join(f"`{algo}`" for algo in sorted(algos)) or "plain")
        for paths, algos in modes
    ]
    limits += [f"`{path}`: scales that the release cuts by rows" for path in row.splits]
    return "; ".join(limits) or "-"


def refused() -> str:
    """Return the sentences about sparse formats and about formats that are refused by name."""
    sparse = {entry.name for entry in SPARSE_FORMATS}
    labels = {CompressionFormat.DENSE, CompressionFormat.FAKEQUANT, CompressionFormat.MIXED_PRECISION}
    read = labels.union(sparse, *(entry.declared_as for entry in FORMATS))
    text = f"Plain and quantized weights may be stored sparse in {', '.join(f'`{name}`' for name in sorted(sparse))}.\n"
    names = ", ".join(f"`{name}`" for name in CompressionFormat if name not in read)
    return text + (f"Known by name, and refused with a message: {names}.\n" if names else "")


LEGEND = f"""A cell gives the mode of a Linear, or `dequantized` if no mode holds its weights.
A star means that the activations differ from the scheme; `inspect` shows a note.
The columns are the capability sets of target `modelopt`, which `--engine` selects (default: `{DEFAULT_ENGINE}`), and \
the reference engine; target `dense` dequantizes everything.
"""


def page() -> str:
    """Return the text of docs/support-matrix.md."""
    serves = "".join(f"- `{target.name}`: {target.serves}.\n" for target in TARGETS.values())
    engines = "".join(f"- `{entry.name}`: {entry.source}.\n" for entry in ENGINES.values())
    return f"""# Support matrix

Generated by `docs/generate_support_matrix.py` from the tables `FORMATS`, `LINEAR_MODES`, `TARGETS`, `ENGINES` and \
`CLASS_ROWS`.
A test fails if this page and the tables differ.

## Linears

The planner computed every cell.
{LEGEND}`dequantized` means plain weights: exact values, rounded once, which need more memory.
The native mode names the family of the scheme and does not depend on the target.
Where two native modes are listed, the second one applies if the `recipe.yaml` beside the weights names AWQ.

{scheme_table(LINEAR)}
{refused()}
## Routed experts

All routed experts of a layer get the same mode.

{scheme_table(EXPERT)}
## Targets

{serves}
## Engines

{engines}
## KV cache

{kv_cache_table()}
## Modes

N is the number of output features, K the number of input features, g the group size.

{mode_table()}
## Architectures

{architectures()}
The engine has its own model class for each architecture and for each model that holds a text model and other parts; \
`trtllm_ct/engine/model_classes.py` lists all of them, with their source.

{model_class_table()}
### Classes with a row

`trtllm_ct/plan/models/class_rows.py` has one row about each class, with its source.
Other architectures are converted with `--to dense` only.
A limit names the Linears whose rows the class rearranges while it loads them, or that it builds plain, and the modes \
that every release reads; in any other mode they are dequantized.
Tests load conversions to `modelopt`, and checkpoints through the plug-in, on a stand-in for the engine and compare \
the slices of every rank; logits come from the reference engine.
Where the row lists the modules of a layer, tests compare these with the modules that transformers builds, and convert \
every scheme for every release.

{class_row_table()}"""


def main() -> None:
    """Write the page, or only compare it if `--check` is given."""
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"Out of date: {PAGE.relative_to(ROOT)}. Run: make docs")


if __name__ == "__main__":
    main()
