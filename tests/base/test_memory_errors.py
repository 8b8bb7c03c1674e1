from __future__ import annotations

import pytest

from trtllm_ct.base.errors import LimitError
from trtllm_ct.base.memory_errors import memory_errors


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 8 GiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 20 MiB."),
        RuntimeError("can't start new thread"),
    ],
    ids=str,
)
def test_an_allocation_that_fails_is_an_error_with_a_remedy(error: Exception) -> None:
    with pytest.raises(LimitError) as raised, memory_errors():
        raise error

    fault = raised.value.faults[0]
    assert fault.found
    assert "ulimit -v" in fault.remedy


def test_another_error_passes() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_errors():
        raise RuntimeError("shape mismatch")


def test_the_library_says_so_too() -> None:
    """As torch words it on this machine."""
    import torch

    with pytest.raises(LimitError), memory_errors():
        torch.empty(1 << 60, dtype=torch.uint8)
