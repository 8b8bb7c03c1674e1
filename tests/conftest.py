"""Markers become selection: tests that need what this machine lacks are deselected, never skipped."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import find_browser
from fewer_combinations import left_out
from hypothesis import HealthCheck, settings
from installed_library import has_library, writes_sparse_files
from installed_transformers import has_newest_transformers
from other_user import IS_ROOT

from trtllm_ct.checkpoint import file_calls
from trtllm_ct.layouts.loops import code_cache

if TYPE_CHECKING:
    from collections.abc import Iterator

# No test needs a network; what asks the hub all the same shall fail at once. Read when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# The library readline, which pytest imports, sets it for all processes that are started; it would wrap reports.
os.environ.pop("COLUMNS", None)

# The same examples in every run; `--hypothesis-profile=default` looks for new ones. How long it takes to make them says
# how busy the machine is, and nothing about the package.
settings.register_profile("repeatable", derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

# Compiling takes seconds in each process that a test starts; one cache serves all of them.
code_cache._keeps_files = True

pytest_plugins = ["engine_fixtures", "tally"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared",
        default=os.environ.get("TRTLLM_CT_SHARED"),
        help="folder with `checkpoints/` and `modelopt-exports/`; selects the tests marked `shared`",
    )

    parser.addoption(
        "--every-class",
        action="store_true",
        help="try every class of transformers in tests/end_to_end/test_any_model.py, not a fixed choice",
    )

    parser.addoption(
        "--tally",
        metavar="FILE",
        help="write what becomes of each class in tests/end_to_end/test_any_model.py to a file, beside what it has",
    )

    parser.addoption(
        "--every-call",
        action="store_true",
        help="end conversions at every file-system call in tests/convert/test_sudden_ends.py, not at a fixed choice",
    )

    parser.addoption(
        "--every-combination",
        action="store_true",
        help="run every combination of parameters of the tests marked `pairs` or `values`, not a choice",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    available = {
        "shared": bool(config.getoption("--shared")),
        "any_library": has_library(),
        "library": has_library((0, 15)),
        "newest_library": has_library((0, 20)),
        "sparse_library": writes_sparse_files(),
        "reference": importlib.util.find_spec("transformers") is not None,
        "newest_transformers": has_newest_transformers(),
        "two_users": IS_ROOT,
        "browser": find_browser() is not None,
        "mpi": importlib.util.find_spec("mpi4py") is not None and shutil.which("mpirun", path=_programs()) is not None,
    }
    missing = {marker for marker, there in available.items() if not there}
    older = available["reference"] and not available["newest_transformers"]
    kept = [
        item
        for item in items
        if not missing & {mark.name for mark in item.iter_markers()} and not (older and _lacks_class(item))
    ]
    if not config.getoption("--every-combination"):
        without = left_out(kept)
        kept = [item for item in kept if item not in without]
    selected = set(kept)
    if len(selected) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in selected])
        items[:] = kept


def _lacks_class(item: pytest.Item) -> bool:
    """Whether a test is about a class that the installed, older transformers lacks.

    The class is one of its parameters, or the marker `model_type` names its type. A test marked `reference`, which
    needs transformers, may also name the class in its body, and runs models that others only write.
    """
    from newer_classes import is_lacking, lacks_family, lacks_type

    values = [*item.callspec.params.values()] if hasattr(item, "callspec") else []
    names = [value for value in values if isinstance(value, str)]
    types = [name for mark in item.iter_markers("model_type") for name in mark.args]
    if item.get_closest_marker("reference") and isinstance(item, pytest.Function):
        if any(map(lacks_family, names)):
            return True
        names += [value for value in item.function.__code__.co_consts if isinstance(value, str)]
    return any(map(is_lacking, names)) or any(map(lacks_type, types))


def pytest_collection_finish() -> None:
    """Leave packages and collected tests, which live to the end, out of every garbage collection of the run."""
    gc.collect()
    gc.freeze()


def _programs() -> str:
    """Where programs are looked for: beside this Python too, where packages put theirs."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test pulls the plug; tests/convert/test_sudden_ends.py simulates it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_calls, "sync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session")
def shared(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.getoption("--shared")).resolve()
