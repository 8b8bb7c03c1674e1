"""The commands of `trtllm-ct cache`."""

from __future__ import annotations

from trtllm_ct.cli import machine_report
from trtllm_ct.cli.options import (
    Json,
)
from trtllm_ct.cli.run import print_json, stdout

__all__ = ["cache_clear", "cache_list"]


def cache_list(as_json: Json = False) -> None:
    """List the directories that were prepared for TensorRT-LLM."""
    from trtllm_ct.serve.cache import cache_root
    from trtllm_ct.serve.listing import list_sidecars

    root, sidecars = cache_root(), list_sidecars()
    if as_json:
        print_json("cache-list", {"root": str(root), "sidecars": [sidecar.to_dict() for sidecar in sidecars]})
    else:
        stdout.print(machine_report.sidecars(root, sidecars))


def cache_clear(as_json: Json = False) -> None:
    """Delete the prepared directories that no running process uses."""
    from trtllm_ct.serve.cache import cache_root, clear_sidecars

    root, cleared = cache_root(), clear_sidecars()
    if as_json:
        directories = {"removed": cleared.removed, "in_use": cleared.in_use, "others": cleared.others}
        paths = {name: [*map(str, directories[name])] for name in directories}
        print_json("cache-clear", {"root": str(root), **paths})
    else:
        stdout.print(machine_report.cleared_sidecars(root, cleared))
