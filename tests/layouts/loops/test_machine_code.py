"""Machine code of loops: compiled once, loaded by later processes without numba, recompiled when out of date."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fresh_python import run_python

from trtllm_ct.layouts.loops import kernels, machine_code
from trtllm_ct.layouts.loops.machine_code import inner, kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

NOWHERE = "/dev/null/no-folder"

PROGRAM = """
    import json, sys
    import numpy as np
    from trtllm_ct.layouts.loops import kernels

    codes = np.empty((1, 2), np.uint8)
    kernels.plain_codes_along_rows(np.zeros((1, 2), np.uint32), 4, 8, codes)
    print(json.dumps([codes.tolist(), "numba" in sys.modules]))
    """


@kernel
def scaled(numbers_I: NDArray[np.float64], factor: float, steps: tuple[int, int, int], results_I: Any) -> None:
    """A loop that takes a float, a tuple, and arrays with any strides."""
    for i in range(numbers_I.shape[0]):
        results_I[i] = more(numbers_I[i] * factor, steps[0] + 10 * steps[1] + 100 * steps[2])


@inner
def more(number: float, step: int) -> float:
    """A loop that another loop calls."""
    return number + step


def run_in_process(folder: Path | str, *, home: Path | str = NOWHERE) -> tuple[list[list[int]], bool]:
    """Run the loop in a new process that caches machine code in `folder` or else in `home`.

    Returns the codes that it computes, and whether it imported numba to compile.
    """
    codes, compiled = json.loads(run_python(PROGRAM, PYTHONPYCACHEPREFIX=folder, XDG_CACHE_HOME=home).stdout)
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

    def test_the_users_cache_is_used_where_the_package_is_read_only(self, tmp_path: Path) -> None:
        assert run_in_process(NOWHERE, home=tmp_path) == ([[248, 248]], True)
        assert run_in_process(NOWHERE, home=tmp_path) == ([[248, 248]], False)
        assert [file.parent for file in object_files(tmp_path)] == [tmp_path / "trtllm_ct"]

    def test_files_beside_the_package_are_readable_by_all_users(self, folder: Path, tmp_path: Path) -> None:
        """An image may be built by root and used by other users; then the caches of these users stay empty."""
        assert run_in_process(folder, home=tmp_path / "home") == ([[248, 248]], False)
        assert not object_files(tmp_path / "home")
        assert all(file.stat().st_mode & 0o044 == 0o044 for file in object_files(folder))

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

    def test_a_change_of_the_source_is_noticed(self, tmp_path: Path) -> None:
        """Also when only an inner loop changes: the stamp covers the whole source file."""
        module = tmp_path / "own_loops.py"
        program = """
            import sys
            sys.path.insert(0, sys.argv[1])
            import numpy as np
            import own_loops

            total = np.zeros(1, np.int64)
            own_loops.loop(total)
            print(total[0])
            """
        source = """
from trtllm_ct.layouts.loops.machine_code import inner, kernel

@kernel
def loop(total_I):
    total_I[0] = called()

@inner
def called():
    return {}
"""
        outputs = []
        for answer in (41, 42):
            module.write_text(source.format(answer))
            done = run_python(program, tmp_path, PYTHONPYCACHEPREFIX=NOWHERE, XDG_CACHE_HOME=tmp_path)
            outputs.append(done.stdout.strip())

        assert outputs == ["41", "42"]
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
        monkeypatch.setattr(machine_code, "_read_cached", lambda _path, _stamp: None)
        monkeypatch.setattr(machine_code, "_write_cached", lambda *_: None)
        monkeypatch.setattr(
            machine_code,
            "_compile",
            lambda loop, types: (compiled_loops.append(loop.__name__), compile_(loop, types))[1],
        )
        loop = kernel(scaled.__wrapped__)  # type: ignore[attr-defined]
        results = np.empty((8, 4))

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda result: loop(np.ones(4), 2.0, (1, 0, 0), result), results))

        assert (results == 3).all()
        assert compiled_loops == ["scaled"]


def loaded(loop: Any) -> dict[Any, Any]:
    """Return the loaded machine code by argument types."""
    machine_code_by_types: dict[Any, Any] = loop._loaded
    return machine_code_by_types
