"""`install()`: after it, `from tensorrt_llm import LLM; LLM(model=DIR)` loads compressed-tensors as it stands.

Two things are put into the running process, and nothing on disk: the constructor of the engine's `LLM` gives a
compressed-tensors model its sidecar and our loader, and the module that TensorRT-LLM's documentation names for such
loaders can be imported. Workers need neither: they get the loader, pickled, and import this package for it.
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
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["DOCUMENTED_MODULE", "install", "uninstall"]

DOCUMENTED_MODULE = "tensorrt_llm._torch.models.checkpoints.compressed_tensors"
"""Where TensorRT-LLM's documentation has a compressed-tensors loader; no release has brought it so far."""


def install(*, dense_o_proj: bool = False, strict: bool = False) -> None:
    """Make TensorRT-LLM's own `LLM` load compressed-tensors models, under every name that it is imported by.

    `dense_o_proj` and `strict` are those of `trtllm_ct.LLM`; a second call replaces them. Other models are not touched.
    `uninstall` undoes all of it. Raises `MissingDependencyError` without TensorRT-LLM.
    """
    require_engine()
    from trtllm_ct.serve.bindings import engine_llm

    uninstall()
    installation = _Installation(engine_llm(), dense_o_proj=dense_o_proj, strict=strict)
    installation.patch()
    # The last finder is asked when no other has found anything, so a module that the engine brings is never hidden.
    sys.meta_path.append(installation)


def uninstall() -> None:
    """Undo `install`; without it, nothing happens."""
    for finder in list(sys.meta_path):
        if isinstance(finder, _Installation):
            sys.meta_path.remove(finder)
            finder.undo()


class _Installation(MetaPathFinder, Loader):
    """What was put in, and how to take it out; also the finder and the maker of the documented module."""

    def __init__(self, llm: type, *, dense_o_proj: bool, strict: bool) -> None:
        self._llm = llm
        self._own_constructor: Callable[..., None] | None = vars(llm).get("__init__")
        self._patched: Callable[..., None] | None = None
        self._options = {"dense_o_proj": dense_o_proj, "strict": strict}
        self._module: ModuleType | None = None

    def patch(self) -> None:
        """Put a constructor in front of the class's own that prepares the arguments."""
        original: Callable[..., None] = self._llm.__init__  # type: ignore[misc]
        signature = inspect.signature(original)

        @functools.wraps(original)
        def constructor(llm: Any, *args: Any, **kwargs: Any) -> None:
            if self._patched is None:
                # Taken out, but another wrapper that came after still calls it.
                return original(llm, *args, **kwargs)
            arguments = _by_name(signature.bind(llm, *args, **kwargs))
            given = self._served(arguments)
            return original(llm, *args, **kwargs) if given is arguments else original(llm, **given)

        self._patched = constructor
        self._llm.__init__ = constructor  # type: ignore[misc]

    def undo(self) -> None:
        """Leave everything as it was; a constructor that somebody put in front of ours meanwhile stays."""
        if vars(self._llm).get("__init__") is self._patched:
            if self._own_constructor is None:
                del self._llm.__init__  # type: ignore[misc]
            else:
                self._llm.__init__ = self._own_constructor  # type: ignore[misc]
        self._patched = None
        if self._module is not None and sys.modules.get(DOCUMENTED_MODULE) is self._module:
            del sys.modules[DOCUMENTED_MODULE]
            package, _, name = DOCUMENTED_MODULE.rpartition(".")
            vars(sys.modules[package]).pop(name, None)

    def _served(self, arguments: dict[str, Any]) -> Any:
        from trtllm_ct.serve.bindings import LOADERS, engine_features
        from trtllm_ct.serve.llm_arguments import served_arguments

        return served_arguments(arguments, engine_features(), LOADERS, **self._options)

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        """The documented module, and no other."""
        return importlib.util.spec_from_loader(fullname, self) if fullname == DOCUMENTED_MODULE else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module this package's classes, which stay those of their own modules."""
        from trtllm_ct.serve import bindings

        names = ("CompressedTensorsCheckpointLoader", "CompressedTensorsConfigLoader", "CompressedTensorsWeightLoader")
        vars(module).update({name: getattr(bindings, name) for name in names}, __all__=list(names))
        module.__doc__ = "Loaders for compressed-tensors checkpoints, put in by trtllm_ct.install()."
        self._module = module


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments of a constructor by name, without the object itself; those of `**kwargs` among the others."""
    _, *arguments = bound.arguments.items()
    parameters = bound.signature.parameters
    named = {name: value for name, value in arguments if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD}
    for name, value in arguments:
        if parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
    return named
