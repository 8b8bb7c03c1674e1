"""Memory for results: tensors like any other, whoever gave the memory."""

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
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything counts as large, or next to nothing."""
    monkeypatch.setattr(memory, "_LARGE", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_is_as_it_was_asked_for(kind: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Contiguous, in CPU memory, at the begin of a cache line where there is any memory at all."""
    tensor = empty(shape, dtype)

    assert (tuple(tensor.shape), tensor.dtype, tensor.device.type) == (shape, dtype, "cpu")
    assert tensor.is_contiguous()
    assert not tensor.requires_grad
    assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0


def test_memory_stays_as_long_as_its_tensor(kind: None) -> None:
    """And two tensors never share any."""
    tensors = [empty((1000,), torch.int32) for _ in range(20)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    gc.collect()
    others = [empty((1000,), torch.int32).fill_(-1) for _ in range(20)]

    assert [tensor.unique().tolist() for tensor in tensors] == [[number] for number in range(20)]
    assert len(others) == 20


def test_what_is_pickled_is_the_tensor_and_little_else(kind: None) -> None:
    tensor = empty((100, 10), torch.int32).fill_(7)

    octets = pickle.dumps(tensor)

    assert len(octets) < tensor.nbytes + 1000
    assert torch.equal(pickle.loads(octets), tensor)


@pytest.mark.parametrize(("nbytes", "numpys"), [(memory._LARGE - 1, False), (memory._LARGE, True)])
def test_numpy_gives_the_memory_of_large_ones_only(nbytes: int, numpys: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such memory lies in huge pages; loading numpy for a small tensor would cost more."""
    import numpy as np

    asked: list[object] = []
    numpy_empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **kinds: asked.append(args) or numpy_empty(*args, **kinds))

    tensor = empty((nbytes,), torch.uint8)

    assert tensor.nbytes == nbytes
    assert bool(asked) is numpys
