"""Result tensors behave like any other tensor, whether torch or numpy allocates their memory."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch

from trtllm_ct.layouts.loops import huge_pages as memory
from trtllm_ct.layouts.loops.huge_pages import empty

DTYPES = [torch.uint8, torch.int8, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float64]
SHAPES = [(), (0,), (0, 5), (1,), (3, 7), (1, 1, 5), (64, 129)]


@pytest.fixture(params=[0, 1 << 22], ids=["large", "small"])
def allocator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the size limit so that all tensors count as large, or so that all tensors of the test count as small."""
    monkeypatch.setattr(memory, "_LARGE", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_has_the_requested_shape_and_dtype(
    allocator: None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """It is contiguous, in CPU memory, and aligned to a cache line unless it is empty."""
    tensor = empty(shape, dtype)

    assert (tuple(tensor.shape), tensor.dtype, tensor.device.type) == (shape, dtype, "cpu")
    assert tensor.is_contiguous()
    assert not tensor.requires_grad
    assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0


def test_memory_lives_as_long_as_its_tensor(allocator: None) -> None:
    """And no two tensors share memory."""
    tensors = [empty((1000,), torch.int32) for _ in range(20)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    gc.collect()
    later_tensors = [empty((1000,), torch.int32).fill_(-1) for _ in range(20)]

    assert [tensor.unique().tolist() for tensor in tensors] == [[number] for number in range(20)]
    assert len(later_tensors) == 20


def test_a_pickle_holds_the_tensor_and_little_else(allocator: None) -> None:
    tensor = empty((100, 10), torch.int32).fill_(7)

    pickled = pickle.dumps(tensor)

    assert len(pickled) < tensor.nbytes + 1000
    assert torch.equal(pickle.loads(pickled), tensor)


@pytest.mark.parametrize(("nbytes", "by_numpy"), [(memory._LARGE - 1, False), (memory._LARGE, True)])
def test_numpy_allocates_large_tensors_only(nbytes: int, by_numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With numpy, memory lies in huge pages; for a small tensor, importing numpy would cost more than it saves."""
    import numpy as np

    requests: list[object] = []
    numpy_empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **options: requests.append(args) or numpy_empty(*args, **options))

    tensor = empty((nbytes,), torch.uint8)

    assert tensor.nbytes == nbytes
    assert bool(requests) is by_numpy
