"""Imitates `executor/worker.py`, `executor/proxy.py` and `llmapi/mpi_session.py`: ranks in threads or processes.

By default each rank is a spawned process. It gets the pickled arguments, the parent's `sys.path`, the parent's
`__main__` module, imported again, and the environment variables named TRTLLM* and TLLM*.
With TLLM_WORKER_USE_SINGLE_PROCESS=1 ranks are threads, loaded one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from tensorrt_llm._torch.distributed import Hub, set_peers
from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader
from tensorrt_llm.mapping import Mapping

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

__all__ = ["Executor", "Worker"]

_FORWARDED = ("TRTLLM", "TLLM")
_starting = threading.Lock()
_SYSTEM = {"PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR"}


class Worker:
    """One rank: its models, and its communication with the other ranks."""

    def __init__(self, llm_args: TorchLlmArgs, model_dir: str, mapping: Mapping) -> None:
        self.model, self.draft_model = ModelLoader(llm_args, mapping).load(model_dir)

    def logits(self, tokens: list[int], draft: bool) -> torch.Tensor:
        model = self.draft_model if draft else self.model
        assert model is not None
        result: torch.Tensor = model(torch.tensor(tokens))
        return result


class _Thread:
    """A rank in this process; `worker` is an attribute so that tests can inspect it."""

    def __init__(self, llm_args: TorchLlmArgs, model_dir: str, mapping: Mapping) -> None:
        self._arguments, self._rank = (llm_args, model_dir, mapping), mapping.rank

    def start(self, hub: Hub) -> None:
        set_peers(_Neighbour(hub, self._rank))
        self.worker = Worker(*self._arguments)

    def logits(self, hub: Hub, tokens: list[int], draft: bool) -> torch.Tensor:
        set_peers(_Neighbour(hub, self._rank))
        return self.worker.logits(tokens, draft)

    def stop(self) -> None:
        """Nothing runs between calls."""


class _Neighbour:
    def __init__(self, hub: Hub, rank: int) -> None:
        self._hub, self._rank = hub, rank

    def exchange(self, group: tuple[int, ...], value: Any) -> list[Any]:
        return self._hub.exchange(group, self._rank, value)


class _Process:
    """A rank in its own process; a call serves its exchanges until the result arrives."""

    def __init__(self, llm_args: TorchLlmArgs, model_dir: str, mapping: Mapping) -> None:
        self._payload, self._rank = pickle.dumps((llm_args, model_dir, mapping)), mapping.rank

    def start(self, hub: Hub) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._payload), daemon=True)
        with _starting, _environment_of_workers():
            self._process.start()
        theirs.close()
        self._answer(hub)

    def logits(self, hub: Hub, tokens: list[int], draft: bool) -> torch.Tensor:
        self._connection.send((tokens, draft))
        return torch.from_numpy(self._answer(hub))

    def stop(self) -> None:
        self._connection.close()
        self._process.join()

    def _answer(self, hub: Hub) -> Any:
        while True:
            kind, value = self._connection.recv()
            if kind == "exchange":
                self._connection.send(hub.exchange(value[0], self._rank, value[1]))
            elif kind == "error":
                raise RuntimeError("Executor worker returned error") from value
            else:
                return value


@contextmanager
def _environment_of_workers() -> Iterator[None]:
    everything = dict(os.environ)
    for name in everything:
        if not name.startswith(_FORWARDED) and name not in _SYSTEM:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(everything)


class _Distant:
    """The communication of a spawned rank with the others, through the parent."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def exchange(self, group: tuple[int, ...], value: torch.Tensor | None) -> list[Any]:
        self._connection.send(("exchange", (group, None if value is None else value.numpy())))
        return [None if each is None else torch.from_numpy(each) for each in self._connection.recv()]


def _serve(connection: Connection, payload: bytes) -> None:
    """The main loop of a worker process; it ends when the parent closes the connection."""
    torch.set_num_threads(1)
    set_peers(_Distant(connection))
    try:
        worker = Worker(*pickle.loads(payload))
        connection.send(("ready", None))
        while True:
            connection.send(("logits", worker.logits(*connection.recv()).numpy()))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 (the parent raises it)
        connection.send(("error", _sendable(error)))


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 (whatever its own pickling raises)
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class Executor:
    """All ranks of a model."""

    def __init__(self, llm_args: TorchLlmArgs, model_dir: str) -> None:
        self.in_process = os.environ.get("TLLM_WORKER_USE_SINGLE_PROCESS") == "1"
        size = llm_args.tensor_parallel_size * llm_args.pipeline_parallel_size
        mappings = [
            Mapping(
                world_size=size,
                rank=rank,
                tp_size=llm_args.tensor_parallel_size,
                pp_size=llm_args.pipeline_parallel_size,
                moe_tp_size=llm_args.moe_tensor_parallel_size or -1,
                moe_ep_size=llm_args.moe_expert_parallel_size or -1,
            )
            for rank in range(size)
        ]
        self.ranks: list[_Thread] | list[_Process]
        if self.in_process:
            # A single rank gets the arguments themselves; several ranks get copies, as processes would.
            copies = [llm_args if size == 1 else pickle.loads(pickle.dumps(llm_args)) for _ in mappings]
            self.ranks = [_Thread(each, model_dir, mapping) for each, mapping in zip(copies, mappings, strict=True)]
        else:
            self.ranks = [_Process(llm_args, model_dir, mapping) for mapping in mappings]
        try:
            self._start()
        except BaseException:
            self.shutdown()
            raise

    def _start(self) -> None:
        """Load threads one after the other, because uninitialized memory is poisoned for the whole process."""
        hub = Hub()
        if self.in_process:
            for rank in self.ranks:
                rank.start(hub)
        else:
            self._together(hub, [partial(rank.start, hub) for rank in self.ranks])

    def logits(self, tokens: list[int], draft: bool = False) -> torch.Tensor:
        """Return float32 logits [tokens, vocabulary]."""
        hub = Hub()
        results: list[torch.Tensor] = self._together(
            hub, [partial(rank.logits, hub, tokens, draft) for rank in self.ranks]
        )
        return results[0]

    @staticmethod
    def _together(hub: Hub, calls: list[Any]) -> list[Any]:
        """Run all ranks at once; after the first failure the others get an error, and the failure is raised."""

        def run(call: Any) -> Any:
            try:
                return call()
            except BaseException:
                hub.abort()
                raise

        if len(calls) == 1:
            return [run(calls[0])]
        with ThreadPoolExecutor(max_workers=len(calls)) as pool:
            futures = [pool.submit(run, call) for call in calls]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, ConnectionAbortedError):
                raise error
        return [future.result() for future in futures]

    def shutdown(self) -> None:
        for rank in self.ranks:
            rank.stop()
        self.ranks = []
