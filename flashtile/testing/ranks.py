"""Processes that stay: a group of ranks on this machine that run one function after another together, for tests and examples."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

START_SECONDS = 120.0
PATIENCE_SECONDS = 60.0  # beyond the group's timeout, for what a rank has to compute


class RankFailed(Exception):
    """A function raised on some ranks; ``errors`` has (type's name, message) or None of each."""

    def __init__(self, errors: list[tuple[str, str] | None], report: str) -> None:
        self.errors = errors
        super().__init__(report)


class Ranks:
    """``size`` processes of one process group: ``with Ranks(2) as ranks: ranks.run(function, ...)``.

    ``function(...)`` is a function of an importable module: it is called on each with the same arguments, and finds its rank by
    torch.distributed. On "nccl" rank r has GPU r as its current device.
    """

    def __init__(self, size: int, backend: str = "gloo", timeout: float = 30.0) -> None:
        self.size, self.timeout = size, timeout
        self._folder = tempfile.TemporaryDirectory()
        # A server that has imported torch forks the ranks: a fork of a process that runs threads might not get far.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "flashtile.distributed", "flashtile.testing.ranks"])
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            facts = (rank, size, backend, str(Path(self._folder.name) / "store"), timeout)
            process = context.Process(target=_serve, args=(theirs, *facts), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            if not pipe.poll(START_SECONDS):
                self.close()
                raise TimeoutError(f"no rank came up within {START_SECONDS} s")
            pipe.recv()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)`` returns on each rank. Raises RankFailed where it raises, or a rank dies."""
        return self.run_each(function, [args] * self.size)

    def run_each(self, function: Callable[..., Any], args: list[tuple[Any, ...]]) -> list[Any]:
        """`run` with arguments of each rank's own."""
        for pipe, given in zip(self._pipes, args):
            pipe.send((function, given))
        answers = [self._answer(pipe) for pipe in self._pipes]
        if any(error is not None for _, error, _ in answers):
            report = "\n".join(f"rank {rank}: {trace}" for rank, (_, error, trace) in enumerate(answers) if error is not None)
            raise RankFailed([error for _, error, _ in answers], report)
        return [value for value, _, _ in answers]

    def _answer(self, pipe: Connection) -> tuple[Any, tuple[str, str] | None, str]:
        try:
            if pipe.poll(self.timeout + PATIENCE_SECONDS):
                answer: tuple[Any, tuple[str, str] | None, str] = pipe.recv()
                return answer
            return None, ("TimeoutError", "no answer"), "no answer in time"
        except (EOFError, ConnectionResetError):
            return None, ("EOFError", "the process has died"), "the process has died"

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _serve(pipe: Connection, rank: int, size: int, backend: str, store: str, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout),
        device_id=torch.device("cuda", rank) if backend == "nccl" else None,
    )  # fmt: skip
    pipe.send("ready")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            answer: tuple[Any, tuple[str, str] | None, str] = (function(*args), None, "")
        except Exception as error:
            answer = (None, (type(error).__name__, str(error)), traceback.format_exc())
        pipe.send(answer)
    dist.destroy_process_group()
