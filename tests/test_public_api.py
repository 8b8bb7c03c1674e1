from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest

import trtllm_ct
from trtllm_ct import reference

PROMISED = {
    "FormatDetector",
    "CompressedTensorsConfigReader",
    "CompressedTensorsConfigLoader",
    "CompressedTensorsWeightLoader",
    "CompressedTensorsWeightMapper",
    "make_plan",
    "inspect_checkpoint",
    "convert_checkpoint",
    "verify_checkpoint",
    "plan_checkpoint",
}


def test_everything_that_was_promised_is_exported() -> None:
    assert set(trtllm_ct.__all__) >= PROMISED


@pytest.mark.parametrize("name", sorted({*trtllm_ct.__all__, *PROMISED} - {"__version__"}))
def test_each_name_is_the_object_of_its_home(name: str) -> None:
    exported = getattr(trtllm_ct, name)

    assert exported is getattr(import_module(f"trtllm_ct.{trtllm_ct._HOMES[name]}"), name)
    assert name in dir(trtllm_ct)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_each_function_and_class_is_documented(name: str) -> None:
    exported = getattr(trtllm_ct, name)

    assert inspect.getdoc(exported)
    methods = [member for label, member in vars(exported).items() if not label.startswith("_") and callable(member)]
    assert all(inspect.getdoc(method) for method in methods)


def test_the_reference_engine_is_exported_from_its_package() -> None:
    parameters = inspect.signature(reference.load_model).parameters

    assert list(parameters) == ["directory", "dtype", "quantize_activations"]
    assert {parameters[name].kind for name in ("dtype", "quantize_activations")} == {inspect.Parameter.KEYWORD_ONLY}


def test_load_weights_has_the_engines_argument_order() -> None:
    parameters = inspect.signature(trtllm_ct.CompressedTensorsWeightLoader.load_weights).parameters

    assert list(parameters) == ["self", "checkpoint_dir", "mapping", "layout", "kwargs"]


@pytest.mark.parametrize("module", [trtllm_ct, reference])
def test_an_unknown_name_is_an_attribute_error(module: object) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018 (the access is what is tested)


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(trtllm_ct.__file__).parent / "py.typed").is_file()
