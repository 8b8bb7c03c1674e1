"""The options of the commands, each written down once; its choices come from the tables of the package.

Every command that makes a plan takes the options of planning through `takes_plan_options`.
"""

from __future__ import annotations

import inspect
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from trtllm_ct.base.dtypes import DENSE_DTYPES
from trtllm_ct.base.errors import Fault, UsageError
from trtllm_ct.base.regular_files import SIDE_FILE_BYTES, read_bounded
from trtllm_ct.base.str_enum import StrEnum
from trtllm_ct.convert.executors import EXECUTORS
from trtllm_ct.engine.build_modes import KERNEL_SMS, UNTESTED
from trtllm_ct.engine.platform import SMS
from trtllm_ct.engine.releases import DEFAULT_ENGINE
from trtllm_ct.engine.requantization import FORMS
from trtllm_ct.engine.target import DIRECTORY_TARGETS, ENGINES, MODELOPT, TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trtllm_ct.engine.parallel import Parallel
    from trtllm_ct.plan.options import PlanArguments

__all__ = [
    "DIRECTORY",
    "THREADS",
    "TO_MODELOPT",
    "AskedExpertParallel",
    "AskedPipelineParallel",
    "AskedSm",
    "AskedTensorParallel",
    "CalibrationOption",
    "Carry",
    "Chat",
    "Directory",
    "DirectoryTarget",
    "Executor",
    "ExpertParallel",
    "Force",
    "Html",
    "Json",
    "Keep",
    "MaxShardSize",
    "NoSync",
    "Overwrite",
    "PipelineParallel",
    "Place",
    "RequantizeOption",
    "Seed",
    "SourcePlace",
    "Strict",
    "TargetName",
    "Temperature",
    "TensorParallel",
    "TextFile",
    "TextTokens",
    "TextWindow",
    "Workers",
    "asked_parallel",
    "name_filter",
    "naming_text",
    "parallel_of",
    "parse_size",
    "prompt_text",
    "takes_plan_options",
    "text_of_file",
]

Place = Annotated[
    str,
    typer.Argument(
        metavar="DIR|ORG/NAME",
        help="Checkpoint directory, or a repository of the Hugging Face Hub, of which headers are read only: "
        "ORG/NAME, ORG/NAME@REVISION, or its URL.",
        show_default=False,
    ),
]
SourcePlace = Annotated[
    str,
    typer.Argument(
        metavar="DIR|ORG/NAME",
        help="Checkpoint directory, or a repository of the Hugging Face Hub, which is downloaded file by file: "
        "ORG/NAME, ORG/NAME@REVISION, or its URL.",
        show_default=False,
    ),
]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint directory.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write the report as one HTML page too.", show_default=False),
]

_STDIN = "-"
"""The name of stdin among arguments."""

_CALIBRATED = [name for name, form in FORMS.items() if form.input_divisor is not None]
"""The forms whose kernels read static scales of inputs."""

_LARGEST_FILE = 2**63
"""No file of Linux has so many bytes."""

if TYPE_CHECKING:
    TargetName = str
    DirectoryTarget = str
    ExecutorName = str
    DenseDtype = str
else:  # Typer offers the members of an enumeration as choices, so these are made from the names in the tables.
    TargetName = StrEnum("TargetName", {name: name for name in TARGETS})
    DirectoryTarget = StrEnum("DirectoryTarget", {name: name for name in DIRECTORY_TARGETS})
    ExecutorName = StrEnum("ExecutorName", {name: name for name in EXECUTORS})
    DenseDtype = StrEnum("DenseDtype", {name: name for name in DENSE_DTYPES})

TO_MODELOPT = TargetName(MODELOPT.name)
DIRECTORY = DirectoryTarget(MODELOPT.name)
ENGINE = DEFAULT_ENGINE
THREADS = ExecutorName(EXECUTORS[0])
AUTO = DenseDtype(DENSE_DTYPES[0])

ForEngine = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="RELEASE",
        help=f"Release of TensorRT-LLM to plan for: {', '.join(ENGINES)}, or a version such as 1.2.1.",
    ),
]
ForSm = Annotated[
    int | None,
    typer.Option(
        "--sm",
        help=f"Compute capability of the GPUs: {', '.join(map(str, SMS))}. By default what all of them have in common, "
        "and modes that only some have.",
        show_default=False,
    ),
]
Untested = Annotated[
    bool,
    typer.Option(
        UNTESTED,
        help="Write int4 weights of target engine as W4A16_GPTQ, for the GPUs of --sm "
        f"({', '.join(map(str, KERNEL_SMS))}) alone. No engine was built from such files.",
    ),
]
TensorParallel = Annotated[int, typer.Option("--tp", help="Tensor-parallel size that the engine will run with.")]
AskedTensorParallel = Annotated[
    int | None, typer.Option("--tp", help="Tensor-parallel size to check.", show_default=False)
]
AskedPipelineParallel = Annotated[
    int | None, typer.Option("--pp", help="Pipeline-parallel size to check.", show_default=False)
]
AskedExpertParallel = Annotated[
    int | None, typer.Option("--ep", help="Expert-parallel size to check.", show_default=False)
]
AskedSm = Annotated[
    int | None, typer.Option("--sm", help="Compute capability of the GPUs to check.", show_default=False)
]
PipelineParallel = Annotated[int, typer.Option("--pp", help="Pipeline-parallel size.")]
ExpertParallel = Annotated[int, typer.Option("--ep", help="Expert-parallel size, a part of the tensor-parallel one.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Fail instead of dequantizing a module, unless --to dense asks for just that."),
]
DenseDtypeOption = Annotated[
    DenseDtype,
    typer.Option(
        "--dtype",
        help="Dtype of dequantized modules, and of engines' models if it has 16 bits; float16 casts plain tensors.",
    ),
]
DenseOutput = Annotated[
    bool, typer.Option("--dense-o-proj", help="Dequantize o_proj if attention would quantize its input coarsely.")
]
RequantizeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--requantize",
        metavar="WHAT=FORM",
        help=f"Keep codes where modules would be dequantized: of experts, linears or all, as {', '.join(FORMS)}.",
        show_default=False,
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help=f"Scales of inputs, as `calibrate` writes them, for {' and '.join(_CALIBRATED)}.",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an OUT that this command wrote earlier, at the end.")
]
Force = Annotated[
    bool, typer.Option("--force", help="With --overwrite: replace any model directory.", show_default=False)
]
NoSync = Annotated[
    bool, typer.Option("--no-sync", help="Don't wait for the disk; a power cut may then leave OUT full of zeros.")
]
Carry = Annotated[
    list[str] | None,
    typer.Option(help="Copy side files of this pattern too, such as 'assets/*'; may be repeated.", metavar="PATTERN"),
]
MaxShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 5GB or 500MiB.")]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Of a repository: the most bytes of downloaded weights on the disk; by default 20GB, or what a module "
        "needs.",
        show_default=False,
    ),
]
Executor = Annotated[
    ExecutorName, typer.Option(help="Run the work in threads of this process, or in the ranks that mpirun started.")
]
Workers = Annotated[
    int | None, typer.Option(help="Number of threads; by default one for each core.", show_default=False)
]
TextFile = Annotated[
    Path, typer.Option("--text", metavar="FILE", help="Text in UTF-8; - reads it from stdin.", show_default=False)
]
TextTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=2, help="Read only so many tokens of the text.", show_default=False)
]
TextWindow = Annotated[
    int, typer.Option("--window", min=2, help="Tokens that are read together; at the end they may be fewer.")
]
Chat = Annotated[
    bool, typer.Option("--chat/--no-chat", help="Put the prompt into the chat template of the tokenizer, if any.")
]
Temperature = Annotated[
    float, typer.Option(min=0, help="Sample tokens at this temperature; 0 takes the most likely one.")
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed samples the same tokens.")]


def _plan_options(
    *,
    engine: ForEngine = ENGINE,
    sm: ForSm = None,
    untested: Untested = False,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    ep: ExpertParallel = 1,
    dtype: DenseDtypeOption = AUTO,
    dense_o_proj: DenseOutput = False,
    requantize: RequantizeOption = None,
    calibration: CalibrationOption = None,
) -> PlanArguments:
    """The options of planning that each command has; returns them as the functions that plan take them."""
    from trtllm_ct.pipeline.calibration import asked_requantization

    return {
        "engine": engine,
        "sm": sm,
        "untested": untested,
        "parallel": parallel_of(tp, pp, ep),
        "dtype": dtype,
        "dense_o_proj": dense_o_proj,
        "requantize": asked_requantization(requantize, calibration),
    }


def takes_plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has the options of planning in the place of its parameter `asked`, which gets them.

    Typer reads the options of a command from its signature and its annotations.
    """
    shared = inspect.signature(_plan_options).parameters
    own = list(inspect.signature(command).parameters.values())
    place = [parameter.name for parameter in own].index("asked")
    unread = {"PlanArguments": object}
    hints = get_type_hints(command, localns=unread, include_extras=True)
    hints |= get_type_hints(_plan_options, localns=unread, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in (*own[:place], *shared.values(), *own[place + 1 :])
    ]

    @wraps(command)
    def run(**values: Any) -> None:
        asked = _plan_options(**{name: values.pop(name) for name in shared})
        command(**values, asked=asked)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def parallel_of(tp: int, pp: int, ep: int) -> Parallel:
    """Return the parallel sizes of the options `--tp`, `--pp` and `--ep`; raises `UsageError` if they don't fit."""
    from trtllm_ct.engine.parallel import Parallel

    return Parallel(tensor=tp, pipeline=pp, expert=ep)


def asked_parallel(tp: int | None, pp: int | None, ep: int | None) -> Parallel | None:
    """Return the sizes that a check was asked for, 1 where an option is left out; None if all of them are.

    Raises `UsageError` if they don't fit.
    """
    if tp is None and pp is None and ep is None:
        return None
    return parallel_of(*(1 if size is None else size for size in (tp, pp, ep)))


def parse_size(text: str, option: str = "--max-shard-size") -> int:
    """Return the number of bytes in a text such as `5GB`, `500 MiB` or `4096`; raises `UsageError` for other text."""
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    match = re.fullmatch(r"(\d{1,19}(?:\.\d{1,19})?)\s*([kmgt]i?|)b?", text.strip().lower())
    size = int(float(match[1]) * units[match[2]]) if match else 0
    if not 1 <= size < _LARGEST_FILE:
        raise UsageError(
            Fault(
                where=option,
                expected="a size such as 5GB, 500MiB or 4096",
                found=repr(text),
                remedy="Give a number of at least one byte, with or without a unit.",
            )
        )
    return size


def name_filter(pattern: str | None) -> Callable[[str], object]:
    """Return a function that says whether a name matches the pattern of `--filter` anywhere; None matches all names.

    Raises `UsageError` if it is no regular expression.
    """
    try:
        return re.compile(pattern or "").search
    except re.error as error:
        raise UsageError(
            Fault(
                where="--filter",
                expected="a regular expression",
                found=f"{pattern!r}: {error}",
                remedy=r"Write a regular expression such as 'layers\.0\..*q_proj', or a part of a name.",
            )
        ) from None


def prompt_text(prompt: str) -> str:
    """Return the prompt of `--prompt`; for `-`, what is sent to stdin, without the line break at its end.

    Raises `UsageError` if stdin is closed or no text in UTF-8.
    """
    return prompt if prompt != _STDIN else _text_of_stdin("Send the prompt to stdin, or name it.")


def _text_of_stdin(remedy: str) -> str:
    """Return what is sent to stdin, without the line break at its end; see `prompt_text`."""
    found = "it closed"
    try:
        if sys.stdin is not None:
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        found = f"a byte that is none, at {error.start}"
    raise UsageError(Fault(where="stdin", expected="text in UTF-8", found=found, remedy=remedy))


@contextmanager
def naming_text(path: Path) -> Iterator[None]:
    """Let the faults of a text name the file that it was read from, instead of the argument of a function."""
    try:
        yield
    except UsageError as error:
        name = "stdin" if str(path) == _STDIN else str(path)
        faults = (replace(fault, where=name) if fault.where == "text" else fault for fault in error.faults)
        raise UsageError(*faults) from error


def text_of_file(path: Path) -> str:
    """Return the text in a file; for `-`, what is sent to stdin.

    Raises `UsageError` for a file that can't be read, or is no text in UTF-8.
    """
    if str(path) == _STDIN:
        return _text_of_stdin("Send text to stdin, or name a file.")
    try:
        return read_bounded(path, SIDE_FILE_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = f"{getattr(error, 'strerror', None) or error}".lower()
        remedy = f"Name another file, or send the text to stdin: --text {_STDIN}."
        fault = Fault(where=str(path), expected="a file with text in UTF-8", found=found, remedy=remedy)
        raise UsageError(fault) from error
