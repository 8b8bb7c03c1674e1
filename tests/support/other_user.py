"""A second user of the machine, for tests of what one user can do to another; only root can become one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["IS_ROOT", "OTHER_USER", "as_other_user"]

IS_ROOT = os.geteuid() == 0
OTHER_USER = 65533
"""The number of a user that owns nothing."""


def as_other_user(act: Callable[[], object], *, user: int = OTHER_USER) -> None:
    """Do something as another user, in a process of its own; raises `AssertionError` if it fails there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            act()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, "what the other user did has failed"
