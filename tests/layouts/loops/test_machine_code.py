"""Machine code of loops: compiled once, loaded by later processes without numba, recompiled when out of date."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fresh_python import run_python

from trtllm_ct.layouts.loops import (
    kernels,
    machine_code,
    requantize_int4_kernels,
    requantize_int4_nvfp4_kernels,
    requantize_kernels,
)
from trtllm_ct.layouts.loops.machine_code import inner, kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

NOWHERE = "/dev/null/no-folder"
LOOPS = [
    *(getattr(kernels, name) for name in kernels.__all__[1:]),
    *(requantize_kernels.e4m3_blocks, requantize_kernels.e2m1_with_e4m3_scales, requantize_kernels.e2m1_with_exponents),
    requantize_int4_kernels.e4m3_blocks,
    requantize_int4_nvfp4_kernels.e2m1_with_e4m3_scales,
    requantize_int4_nvfp4_kernels.e2m1_with_e4m3_scales_and_zero_points,
    requantize_int4_kernels.e2m1_with_exponents,
]

PROGRAM = """
    import json, sys
    import numpy as np
    from trtllm_ct.layouts.loops import kernels

    codes = np.empty((1, 2), np.uint8)
    kernels.plain_codes_along_rows(np.zeros((1, 2), np.uint32), 4, 8, codes)
    print(json.dumps([codes.tolist(), "numba" in sys.modules]))
    """


EXAMPLE: tuple[Any, ...] = ([1.0, 2.0], 2.0, (1, 2, 3), [0.0, 0.0])


@kernel(*EXAMPLE)
def scaled(numbers_I: NDArray[np.float64], factor: float, steps: tuple[int, int, int], results_I: Any) -> None:
    """A loop that takes a float, a tuple, and arrays with any strides."""
    for i in range(numbers_I.shape[0]):
        results_I[i] = more(numbers_I[i] * factor, steps[0] + 10 * steps[1] + 100 * steps[2])


@inner
def more(number: float, step: int) -> float:
    """A loop that another loop calls."""
    return number + step


def run_in_process(home: Path | str, **variables: object) -> tuple[list[list[int]], bool]:
    """Run the loop in a new process that caches machine code below `home`.

    Returns the codes that it computes, and whether it imported numba to compile.
    """
    variables = {"XDG_CACHE_HOME": home, "PYTHONDONTWRITEBYTECODE": "", **variables}
    codes, compiled = json.loads(run_python(PROGRAM, **variables).stdout)
    return codes, compiled


def object_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.o"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that a first process has filled."""
    folder = tmp_path_factory.mktemp("compiled")
    assert run_in_process(folder) == ([[248, 248]], True)
    return folder


@pytest.fixture
def folder(compiled: Path, tmp_path: Path) -> Path:
    """A copy of the filled cache folder."""
    return Path(shutil.copytree(compiled, tmp_path / "folder"))


class TestFiles:
    """The cache that processes share."""

    def test_the_first_process_compiles_and_later_ones_need_no_compiler(self, folder: Path) -> None:
        assert run_in_process(folder) == ([[248, 248]], False)
        assert [file.name.split(".")[:2] for file in object_files(folder)] == [["kernels", "plain_codes_along_rows"]]

    def test_nothing_is_written_beside_the_source(self, folder: Path) -> None:
        package = Path(machine_code.__file__).parents[2]

        assert [file.parent for file in object_files(folder)] == [folder / "trtllm_ct"]
        assert not object_files(package)

    def test_loops_run_where_no_folder_can_be_written(self) -> None:
        """Each process compiles for itself."""
        assert run_in_process(NOWHERE) == ([[248, 248]], True)

    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(lambda content: content[:-1], id="cut short"),
            pytest.param(lambda content: content[:70] + b"?" + content[71:], id="another byte"),
            pytest.param(lambda content: bytes(32) + content[32:], id="another source"),
            pytest.param(lambda _content: b"", id="empty"),
            pytest.param(lambda content: content + b"\0", id="longer"),
        ],
    )
    def test_an_incomplete_or_outdated_file_is_compiled_again(
        self, folder: Path, damage: Callable[[bytes], bytes]
    ) -> None:
        (file,) = object_files(folder)
        content = file.read_bytes()
        file.write_bytes(damage(content))

        assert run_in_process(folder) == ([[248, 248]], True)
        assert file.read_bytes() == content
        assert object_files(folder) == [file]

    @pytest.mark.parametrize("changed", ["own_loops", "called_loops", "operations"])
    def test_a_change_of_the_source_is_noticed(self, tmp_path: Path, changed: str) -> None:
        """Also when only something changes that a loop calls, in its own file or in another one."""
        program = """
            import sys
            sys.path.insert(0, sys.argv[1])
            import numpy as np
            import own_loops

            total = np.zeros(1, np.int64)
            own_loops.loop(total)
            print(total[0])
            """
        sources = {
            "own_loops": """
from called_loops import called
from trtllm_ct.layouts.loops.machine_code import inner, kernel

@kernel([0])
def loop(total_I):
    total_I[0] = called() + own()

@inner
def own():
    return {}
""",
            "called_loops": """
from operations import product
from trtllm_ct.layouts.loops.machine_code import inner

_TEN = 10

@inner
def called():
    return product(_TEN, {})
""",
            "operations": """
from llvmlite import ir
from trtllm_ct.layouts.loops.machine_code import operation

@operation("int64")
def product(build, one, other):
    return build.mul(build.mul(one, other), ir.Constant(ir.IntType(64), {}))
""",
        }
        outputs = []
        for answer in (2, 3):
            for name, source in sources.items():
                (tmp_path / f"{name}.py").write_text(source.replace("{}", str(answer if name == changed else 1)))
            done = run_python(
                program, tmp_path, PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=NOWHERE, XDG_CACHE_HOME=tmp_path
            )
            outputs.append(int(done.stdout))

        assert outputs == ([12, 13] if changed == "own_loops" else [21, 31])
        assert len(object_files(tmp_path)) == 1


class TestArguments:
    """The loop receives the arguments of the call."""

    @pytest.mark.parametrize("factor", [0.5, -0.0, float("inf"), float("nan")])
    @pytest.mark.parametrize("size", [0, 1, 7, 64])
    def test_numbers_and_tuples_are_passed(self, size: int, factor: float) -> None:
        numbers, results = np.arange(size, dtype=np.float64) + 1, np.empty(size)

        scaled(numbers, factor, (3, 2, 1), results)

        np.testing.assert_array_equal(results, numbers * factor + 123)

    @pytest.mark.parametrize("step", [1, 2, -1, -3])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
    def test_arrays_may_have_any_strides(self, dtype: type, step: int) -> None:
        """Any strides, any dtype; the elements in between don't change."""
        numbers, memory = np.arange(30, dtype=np.float64), np.full(30, -7, dtype)
        strided = numbers[::step]

        scaled(strided, 2.0, (0, 0, 0), memory[::step])

        expected = np.full(30, -7, dtype)
        expected[::step] = strided * 2
        np.testing.assert_array_equal(memory, expected)

    def test_arrays_of_several_axes_are_passed(self) -> None:
        """With a loop of this package whose result is easy to check."""
        words, codes = np.array([[0x76543210, 0], [0, 0]], np.uint32)[:1], np.empty((8, 2), np.uint8)

        kernels.plain_codes_along_rows(words, 4, 8, codes)

        assert codes.astype(np.int8).tolist() == [[n - 8, -8] for n in range(8)]

    def test_integers_of_any_type_use_the_same_machine_code(self) -> None:
        """True and numpy integers count as int: the loop is not compiled a second time."""
        words, codes = np.zeros((1, 1), np.uint32), np.empty((8, 1), np.uint8)
        kernels.plain_codes_along_rows(words, 4, 8, codes)
        before = len(loaded(kernels.plain_codes_along_rows))

        kernels.plain_codes_along_rows(words, np.int64(4), True + 7, codes)

        assert len(loaded(kernels.plain_codes_along_rows)) == before

    def test_threads_that_start_together_compile_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled_loops: list[str] = []
        compile_ = machine_code._compile
        monkeypatch.setattr(machine_code, "read_cached", lambda _name, _stamp: None)
        monkeypatch.setattr(machine_code, "write_cached", lambda *_: None)
        monkeypatch.setattr(
            machine_code,
            "_compile",
            lambda loop, types: (compiled_loops.append(loop.__name__), compile_(loop, types))[1],
        )
        loop = kernel(*EXAMPLE)(scaled.__wrapped__)  # type: ignore[attr-defined]
        results = np.empty((8, 4))

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda result: loop(np.ones(4), 2.0, (1, 0, 0), result), results))

        assert (results == 3).all()
        assert compiled_loops == ["scaled"]


def test_every_file_that_decides_what_an_object_file_holds_is_in_its_stamp() -> None:
    loop = requantize_int4_nvfp4_kernels.e2m1_with_e4m3_scales.__wrapped__  # type: ignore[attr-defined]

    stamped = {*machine_code._sources(loop), *machine_code._SOURCES}

    own = ["code_cache", "lanes", "machine_code", "vectors"]
    own += ["requantize_int4_kernels", "requantize_int4_nvfp4_kernels", "requantize_kernels"]
    assert stamped == {str(Path(machine_code.__file__).with_name(f"{name}.py")) for name in own}


class TestDoubt:
    """Machine code that is not as expected is neither used nor kept; numba's own function runs."""

    @pytest.fixture
    def kept(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of files that were kept."""
        names: list[str] = []
        monkeypatch.setattr(machine_code, "read_cached", lambda _name, _stamp: None)
        monkeypatch.setattr(machine_code, "write_cached", lambda name, *_: names.append(name))
        return names

    def called(self, example: tuple[Any, ...]) -> NDArray[np.float64]:
        results = np.zeros(3)
        kernel(*example)(scaled.__wrapped__)(np.arange(3.0), 2.0, (1, 0, 0), results)  # type: ignore[attr-defined]
        return results

    def test_without_doubt_it_is_kept(self, kept: list[str]) -> None:
        assert self.called(EXAMPLE).tolist() == [1, 3, 5]
        assert len(kept) == 1

    @pytest.mark.parametrize(
        ("pattern", "replacement"),
        [
            pytest.param(r"fmul double", "fadd double", id="another computation"),
            pytest.param(r"fmul double", "fmul doubble", id="not LLVM's language"),
            pytest.param(r"\Z", "\ndefine i32 @other(ptr %x) {\nret i32 0\n}\n", id="another function"),
            pytest.param(r"(define [^@]*@[\w.$]+\(ptr [^,]*,)", r"\1 i64 %new,", id="another parameter"),
            pytest.param(r"fmul double ([^,]*), ", r"call double @no_such_function(double \1) ;", id="another call"),
        ],
    )
    def test_assembly_of_another_numba(
        self,
        kept: list[str],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        pattern: str,
        replacement: str,
    ) -> None:
        compile_ = machine_code._compile

        class Changed:
            def __init__(self, dispatcher: Any) -> None:
                self.dispatcher, self.signatures = dispatcher, dispatcher.signatures

            def __call__(self, *arguments: Any) -> None:
                self.dispatcher(*arguments)

            def inspect_llvm(self, signature: Any) -> str:
                text = self.dispatcher.inspect_llvm(signature)
                changed = re.sub(pattern, replacement, text)
                assert changed != text
                return changed + "declare double @no_such_function(double)\n" * ("no_such_function" in changed)

        monkeypatch.setattr(machine_code, "_compile", lambda *arguments: Changed(compile_(*arguments)))

        assert self.called(EXAMPLE).tolist() == [1, 3, 5]
        assert kept == []
        assert "numba's own function" in caplog.text

    @pytest.mark.parametrize("example", [(), EXAMPLE[:3], ([1], *EXAMPLE[1:3], [[0]])])
    def test_without_an_example_that_fits(self, kept: list[str], example: tuple[Any, ...]) -> None:
        assert self.called(example).tolist() == [1, 3, 5]
        assert kept == []

    @pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: f"{loop.__module__.rpartition('.')[2]}.{loop.__name__}")
    def test_every_loop_of_this_package_has_an_example(self, loop: Any) -> None:
        assert len(loop._example) == loop.__wrapped__.__code__.co_argcount


def loaded(loop: Any) -> dict[Any, Any]:
    """Return the loaded machine code by argument types."""
    machine_code_by_types: dict[Any, Any] = loop._loaded
    return machine_code_by_types
