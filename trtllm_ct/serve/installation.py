"""`install()`: makes `from tensorrt_llm import LLM; LLM(model=DIR)` load compressed-tensors models.

It changes two things in the running process, and nothing on disk:

- The constructor of the engine's `LLM` replaces a compressed-tensors model by its sidecar and adds this package's
  checkpoint loader.
- The module that TensorRT-LLM's documentation names for compressed-tensors loaders can be imported.

The engine's workers need neither: they unpickle the loader, which imports this package.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

from trtllm_ct.serve.llm import require_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType

__all__ = ["DOCUMENTED_MODULE", "install", "uninstall"]

DOCUMENTED_MODULE = "tensorrt_llm._torch.models.checkpoints.compressed_tensors"
"""The module in which TensorRT-LLM's documentation places a compressed-tensors loader; no release has it so far."""


def install(
    *,
    dense_o_proj: bool = False,
    requantize: str | Mapping[str, str] | None = None,
    calibration: str | Path | None = None,
    strict: bool = False,
) -> None:
    """Make TensorRT-LLM's own `LLM` load compressed-tensors models.

    The class itself is patched, so it does not matter how a program imports it. Other models are loaded as before.
    `dense_o_proj`, `requantize`, `calibration` and `strict` are the options of `trtllm_ct.LLM`; a second call replaces
    them.
    `uninstall` undoes the change. Raises `MissingDependencyError` when TensorRT-LLM is not installed.
    """
    require_engine()
    from trtllm_ct.serve.bindings import engine_llm

    uninstall()
    installation = _Installation(
        engine_llm(), dense_o_proj=dense_o_proj, requantize=requantize, calibration=calibration, strict=strict
    )
    installation.patch()
    # Python asks the last finder only when no other one has found the module, so the engine's modules are never hidden.
    sys.meta_path.append(installation)


def uninstall() -> None:
    """Undo `install`; does nothing when it was not called."""
    for finder in list(sys.meta_path):
        if isinstance(finder, _Installation):
            sys.meta_path.remove(finder)
            finder.undo()


class _Installation(MetaPathFinder, Loader):
    """The patch of one `install` call: applies it, undoes it, and is the import finder of `DOCUMENTED_MODULE`."""

    def __init__(self, llm: type, **options: Any) -> None:
        self._llm = llm
        self._class_constructor: Callable[..., None] | None = vars(llm).get("__init__")
        self._patched: Callable[..., None] | None = None
        self._options = options
        self._module: ModuleType | None = None

    def patch(self) -> None:
        """Wrap the constructor of `LLM` in one that prepares the arguments."""
        original: Callable[..., None] = self._llm.__init__  # type: ignore[misc]
        signature = inspect.signature(original)

        @functools.wraps(original)
        def constructor(llm: Any, *args: Any, **kwargs: Any) -> None:
            if self._patched is None:
                # The patch was undone, but another library's wrapper still calls this function.
                return original(llm, *args, **kwargs)
            arguments = _by_name(signature.bind(llm, *args, **kwargs))
            prepared = self._prepare(arguments)
            return original(llm, *args, **kwargs) if prepared is arguments else original(llm, **prepared)

        self._patched = constructor
        self._llm.__init__ = constructor  # type: ignore[misc]

    def undo(self) -> None:
        """Undo the patch. If another library has wrapped the constructor meanwhile, that wrapper stays."""
        if vars(self._llm).get("__init__") is self._patched:
            if self._class_constructor is None:
                del self._llm.__init__  # type: ignore[misc]
            else:
                self._llm.__init__ = self._class_constructor  # type: ignore[misc]
        self._patched = None
        if self._module is not None and sys.modules.get(DOCUMENTED_MODULE) is self._module:
            del sys.modules[DOCUMENTED_MODULE]
            package, _, name = DOCUMENTED_MODULE.rpartition(".")
            vars(sys.modules[package]).pop(name, None)

    def _prepare(self, arguments: dict[str, Any]) -> Any:
        from trtllm_ct.serve.bindings import LOADERS, engine_features
        from trtllm_ct.serve.llm_arguments import engine_arguments

        return engine_arguments(arguments, engine_features(), LOADERS, **self._options)

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        """Find `DOCUMENTED_MODULE` and no other module."""
        return importlib.util.spec_from_loader(fullname, self) if fullname == DOCUMENTED_MODULE else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with this package's loader classes; their `__module__` stays `trtllm_ct.serve.bindings`."""
        from trtllm_ct.serve import bindings

        names = ("CompressedTensorsCheckpointLoader", "CompressedTensorsConfigLoader", "CompressedTensorsWeightLoader")
        vars(module).update({name: getattr(bindings, name) for name in names}, __all__=list(names))
        module.__doc__ = "Loaders for compressed-tensors checkpoints, put in by trtllm_ct.install()."
        self._module = module


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return the bound arguments of a constructor by name, without `self` and with `**kwargs` merged in."""
    _, *arguments = bound.arguments.items()
    parameters = bound.signature.parameters
    named = {name: value for name, value in arguments if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD}
    for name, value in arguments:
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
    return named
