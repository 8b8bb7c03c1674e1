"""`install()` makes `from tensorrt_llm import LLM` take compressed-tensors directories, and `uninstall()` undoes it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_double
import pytest
from builders import tiny_config, write_checkpoint
from engine_fixtures import BINDINGS
from fresh_python import run_python

import trtllm_ct
from trtllm_ct import convert_checkpoint, install, uninstall
from trtllm_ct.base.errors import MissingDependencyError, UsageError
from trtllm_ct.serve.installation import DOCUMENTED_MODULE
from trtllm_ct.serve.sidecar import Sidecar, is_sidecar

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO = Path(trtllm_ct.__file__).parent / "cli" / "demo_data"
TOKENS = list(range(5, 25))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_CT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=engine_double.GENERATIONS)
def engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    with engine_double.installed(request.param, importers=[BINDINGS]) as module:
        yield module
        uninstall()


def fails(engine: Any) -> bool:
    """Whether the engine raises for the demo checkpoint, as stock TensorRT-LLM does."""
    try:
        engine.LLM(DEMO, skip_tokenizer_init=True)
    except (NotImplementedError, TypeError):
        return True
    return False


def test_the_engines_llm_loads_a_compressed_tensors_directory(engine: Any) -> None:
    assert fails(engine)

    install()

    from tensorrt_llm import LLM

    llm = LLM(model=DEMO, skip_tokenizer_init=True)
    assert type(llm) is LLM is engine.LLM
    assert llm.logits(TOKENS).equal(trtllm_ct.LLM(DEMO, skip_tokenizer_init=True).logits(TOKENS))


def test_all_imports_and_subclasses_of_the_class_are_patched(engine: Any) -> None:
    class Mine(engine.LLM):
        def __init__(self, model: Path) -> None:
            super().__init__(model, None, "auto", True)

    install()

    llmapi = importlib.import_module("tensorrt_llm.llmapi")
    assert is_sidecar(llmapi.LLM(DEMO, None, "auto", True, False, 2).args.model)
    assert is_sidecar(Mine(DEMO).args.model)


def test_positional_arguments_are_passed_on(engine: Any) -> None:
    install()

    args = engine.LLM(DEMO, None, "auto", True, False, 2, "float16", max_seq_len=99).args

    assert (args.skip_tokenizer_init, args.tensor_parallel_size, args.dtype, args.max_seq_len) == (
        True,
        2,
        "float16",
        99,
    )
    assert Sidecar.open(args.model).options.parallel.tensor == 2


def test_uninstall_leaves_the_class_as_it_was(engine: Any) -> None:
    before, members = engine.LLM.__init__, set(vars(engine.LLM))

    install()
    install()
    uninstall()

    assert engine.LLM.__init__ is before
    assert set(vars(engine.LLM)) == members
    assert fails(engine)
    uninstall()
    assert engine.LLM.__init__ is before


def test_an_inherited_constructor_is_inherited_again(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Outer(engine.LLM):
        """In some releases, LLM inherits the constructor of its base class."""

    monkeypatch.setattr("tensorrt_llm.LLM", Outer)
    install()
    assert is_sidecar(Outer(DEMO, skip_tokenizer_init=True).args.model)

    uninstall()

    assert "__init__" not in vars(Outer)
    assert fails(engine)


def test_a_later_wrapper_stays_after_uninstall(engine: Any) -> None:
    install()
    ours, calls = engine.LLM.__init__, []

    def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        ours(self, *args, **kwargs)

    engine.LLM.__init__ = theirs
    uninstall()

    assert engine.LLM.__init__ is theirs
    assert fails(engine)
    assert len(calls) == 1


def test_this_packages_llm_works_while_installed(engine: Any) -> None:
    install()

    llm = trtllm_ct.LLM(DEMO, skip_tokenizer_init=True, tensor_parallel_size=2)

    assert is_sidecar(llm.args.model)
    assert not is_sidecar(Sidecar.open(llm.args.model).source)


@pytest.mark.parametrize("kind", ["modelopt", "dense"])
def test_other_models_are_not_touched(engine: Any, tmp_path: Path, kind: Any) -> None:
    convert_checkpoint(DEMO, tmp_path / "out", to=kind)
    install()

    args = engine.LLM(str(tmp_path / "out"), skip_tokenizer_init=True, checkpoint_format="HF").args

    assert (args.model, args.checkpoint_loader, args.checkpoint_format) == (str(tmp_path / "out"), None, "HF")


def test_arguments_that_drop_the_loader_raise(engine: Any) -> None:
    install()

    with pytest.raises(UsageError, match="checkpoint_format='HF'"):
        engine.LLM(DEMO, checkpoint_format="HF")
    with pytest.raises(TypeError, match="model"):
        engine.LLM()


def test_options_are_those_of_the_last_call(engine: Any, tmp_path: Path) -> None:
    built = write_checkpoint(tmp_path / "made", config=tiny_config(), scheme="fp8-channel-token")
    install()
    install(dense_o_proj=True, strict=True)

    options = Sidecar.open(engine.LLM(built.directory, skip_tokenizer_init=True).args.model).options

    assert (options.dense_o_proj, options.strict) == (True, True)


def test_the_documented_import_works_while_it_is_installed(engine: Any) -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(DOCUMENTED_MODULE)

    install()

    from tensorrt_llm._torch.models.checkpoints.compressed_tensors import (
        CompressedTensorsConfigLoader,
        CompressedTensorsWeightLoader,
    )

    from trtllm_ct.serve import bindings

    assert CompressedTensorsWeightLoader is bindings.CompressedTensorsWeightLoader
    assert CompressedTensorsConfigLoader is bindings.CompressedTensorsConfigLoader
    assert CompressedTensorsWeightLoader.__module__ == BINDINGS
    loader_class = importlib.import_module(
        "tensorrt_llm._torch.models.checkpoints.hf.checkpoint_loader"
    ).HfCheckpointLoader
    loader = loader_class(weight_loader=CompressedTensorsWeightLoader(), config_loader=CompressedTensorsConfigLoader())
    assert engine.LLM(DEMO, skip_tokenizer_init=True, checkpoint_loader=loader).logits(TOKENS).isfinite().all()

    uninstall()

    assert DOCUMENTED_MODULE not in sys.modules
    assert not hasattr(sys.modules[DOCUMENTED_MODULE.rpartition(".")[0]], "compressed_tensors")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(DOCUMENTED_MODULE)


@pytest.mark.parametrize("imported_before", [True, False])
def test_a_module_of_that_name_in_the_engine_is_not_hidden(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported_before: bool
) -> None:
    (tmp_path / "compressed_tensors.py").write_text("UPSTREAM = True\n")
    checkpoints = importlib.import_module(DOCUMENTED_MODULE.rpartition(".")[0])
    monkeypatch.setattr(checkpoints, "__path__", [*checkpoints.__path__, str(tmp_path)])
    if imported_before:
        importlib.import_module(DOCUMENTED_MODULE)

    install()
    assert importlib.import_module(DOCUMENTED_MODULE).UPSTREAM
    uninstall()

    assert importlib.import_module(DOCUMENTED_MODULE).UPSTREAM


def test_install_raises_without_the_engine() -> None:
    with pytest.raises(MissingDependencyError, match="tensorrt_llm"):
        install()
    uninstall()


def test_importing_the_package_installs_nothing() -> None:
    code = """
        import sys
        before = list(sys.meta_path)
        import trtllm_ct, trtllm_ct.serve.installation
        print(sys.meta_path == before, "tensorrt_llm" in sys.modules)
    """

    assert run_python(code).stdout.split() == ["True", "False"]
