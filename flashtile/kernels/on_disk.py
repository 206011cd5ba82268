"""Kernels compiled into Triton's cache on disk, for a GPU that need not be here, and what of them lies there."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs

from flashtile.kernels.compiled import target_of
from flashtile.kernels.launch import compile_spec
from flashtile.kernels.spec import Spec

_LISTENING = threading.Lock()  # Triton has one listener


class Stored(NamedTuple):
    """A kernel on disk: whether it was compiled for it now or lay there before, the bytes of its files, and the seconds that it took."""

    kernel: str
    compiled: bool
    num_bytes: int
    seconds: float


def folder() -> Path:
    """Triton's cache on disk (the environment variable TRITON_CACHE_DIR names it); it need not be there yet."""
    return Path(knobs.cache.dir)


def store(spec: Spec, arch: str) -> Stored:
    """Compiles a kernel for an architecture ("sm_90", "gfx942") into the folder, unless it lies there. Loads nothing and needs no GPU."""
    began = time.perf_counter()
    with _heard() as compilations:  # a kernel that would spill is compiled twice
        compile_spec(spec, target_of(arch))
    seconds = time.perf_counter() - began
    files = {Path(path) for heard in compilations for path in heard["metadata_group"].values()}
    compiled = any(not heard["cache_hit"] for heard in compilations)
    return Stored(spec.kernel.__name__, compiled, sum(file.stat().st_size for file in files), seconds)


@contextmanager
def _heard() -> Generator[list[dict[str, Any]], None, None]:
    """What Triton tells of each compilation in the block; a listener that is there hears of them too."""
    told: list[dict[str, Any]] = []

    def listen(**facts: Any) -> None:
        told.append(facts)
        if before is not None:
            before(**facts)

    with _LISTENING:
        before = knobs.compilation.listener
        knobs.compilation.listener = listen
        try:
            yield told
        finally:
            knobs.compilation.listener = before
