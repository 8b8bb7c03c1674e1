"""What lies in the directory of sidecars, for people: `trtllm-ct cache list`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtllm_ct.base.errors import Fault, SidecarError
from trtllm_ct.base.json_form import json_object
from trtllm_ct.serve.cache import cached_sidecars
from trtllm_ct.serve.sidecar import Sidecar

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ListedSidecar", "list_sidecars"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedSidecar:
    """A sidecar directory: what its own file says, or what is wrong with that."""

    directory: Path
    sidecar: Sidecar | None
    fault: Fault | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        sidecar = self.sidecar
        return json_object(
            {
                "directory": self.directory,
                "source": sidecar.source if sidecar else None,
                "repository": sidecar.repository.name if sidecar and sidecar.repository else None,
                "options": sidecar.options if sidecar else None,
                "fault": self.fault,
            }
        )


def list_sidecars(root: Path | None = None) -> tuple[ListedSidecar, ...]:
    """The sidecars in `root`, `cache_root()` when None, by name."""
    return tuple(_listed(directory) for directory in cached_sidecars(root))


def _listed(directory: Path) -> ListedSidecar:
    try:
        return ListedSidecar(directory=directory, sidecar=Sidecar.open(directory))
    except SidecarError as error:
        return ListedSidecar(directory=directory, sidecar=None, fault=error.faults[0])
