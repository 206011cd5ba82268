"""The contestants of one problem: who is still in, what became of each, and whether the GPU is still there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks import timing
from benchmarks.refusals import Refused, WrongResult
from flashtile.errors import AttentionError


class DeviceLost(Exception):
    """The GPU's context is broken: nothing more can be measured in this process."""


class Judge(Protocol):
    """What knows a problem's right results: ``error`` raises WrongResult where a contestant's are off."""

    def error(self, result: Any) -> float: ...


class Trials:
    """The contestants of one problem; ``step`` is told what is about to run."""

    def __init__(self, device: torch.device, step: Callable[[str], None] = lambda name: None) -> None:
        self.device = device
        self.step = step
        self.fns: dict[str, timing.Contestant] = {}
        self.results: dict[str, dict[str, Any]] = {}

    def enter(self, name: str, make: Callable[[], timing.Contestant], judge: Judge | None) -> None:
        """Makes a contestant and checks its result on set 0; only then does it take part."""
        self.results[name] = {}

        def first_call() -> None:
            fn = make()
            result = fn(0)
            if judge is not None:
                self.results[name]["error"] = round(judge.error(result), 6)
            self.fns[name] = fn

        self.attempt(name, first_call)

    def attempt(self, name: str, action: Callable[[], object]) -> bool:
        """Runs one step of a contestant; a failure is recorded and ends its part. Raises DeviceLost where the GPU is gone."""
        self.step(name)
        try:
            action()
        except (Refused, AttentionError) as error:
            self._drop(name, "refused", error)
        except WrongResult as error:
            self._drop(name, "wrong", error)
        except Exception as error:  # a peer may fail in any way, and the others are still to be timed
            self._drop(name, "failed", error)
        ensure_alive(self.device)
        return name in self.fns

    def _drop(self, name: str, how: str, error: Exception) -> None:
        self.fns.pop(name, None)
        self.results[name] = {how: f"{type(error).__name__}: {error}"[:500]}


def ensure_alive(device: torch.device) -> None:
    """Raises DeviceLost once a kernel has broken the CUDA context."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise DeviceLost(str(error).splitlines()[0]) from error
