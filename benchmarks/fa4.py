"""FlashAttention-4 from the peers folder: loading it, calling it, and compiling it ahead in processes that see no GPU.

Its kernels compile at first call, in 2 to 10 seconds each; where its own cache on disk is switched on, a call of fake tensors in
any process leaves the kernel there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.forward_grids import Shape, shrunk
from benchmarks.forward_sets import InputSets
from benchmarks.refusals import Refused
from benchmarks.timing import Contestant

CACHE = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}  # read when the package is imported
SMALL = 512  # queries of a problem that is compiled ahead: more than any tile


def lies_in(folder: Path) -> bool:
    return (folder / "fa4").is_dir()


def load(folder: Path) -> str | None:
    """Imports it from ``folder``; why not, where it is missing or does not load."""
    root = folder / "fa4"
    if not lies_in(folder):
        return f"{root} does not exist"
    os.environ.update(CACHE)
    for path in (root, root / "nvidia_cutlass_dsl" / "dsl_packages"):
        if str(path) not in sys.path:
            sys.path.append(str(path))  # last, so that it shadows nothing that is installed
    try:
        import flash_attn.cute  # noqa: F401
    except Exception as error:  # a package of compiled parts fails in many ways
        return f"{type(error).__name__}: {error}"[:300]
    return None


def contestant(sets: InputSets) -> Contestant:
    """Its own choice of everything; packed problems through its varlen function, pages by their table."""
    try:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except Exception as error:
        raise Refused(f"flash_attn.cute: {error}") from error
    shape = sets.shape
    options: dict[str, Any] = {"causal": shape.causal, "return_lse": True}
    if shape.window is not None:
        options["window_size"] = shape.window
    if not shape.packed:
        return without_gradients(lambda i: flash_attn_func(sets.q[i], sets.k[i], sets.v[i], **options))
    options |= {"cu_seqlens_q": sets.cu_seqlens_q, "max_seqlen_q": sets.max_seqlen_q, "max_seqlen_k": sets.max_seqlen_k}
    options |= {"cu_seqlens_k": sets.cu_seqlens_k} if sets.page_table is None else {
        "page_table": sets.page_table, "seqused_k": sets.seqused_k,
    }  # fmt: skip
    return without_gradients(lambda i: flash_attn_varlen_func(sets.q[i], sets.k[i], sets.v[i], **options))


def without_gradients(call: Callable[[int], Any]) -> Contestant:
    def run(i: int) -> Any:
        with torch.no_grad():
            return call(i)

    return run


class Ahead:
    """Processes that compile what FlashAttention-4 needs for some problems; ``wait`` is called once the kernels are wanted.

    ``compile_shape`` compiles for one problem, in a worker: a function of some module, since it is sent there by name.
    """

    def __init__(
        self,
        shapes: Iterable[Shape],
        folder: Path,
        device: torch.device,
        compile_shape: Callable[[Any], None] | None = None,
        workers: int = 6,
    ) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._jobs: list[Future[None]] = []
        if device.type != "cuda":
            return
        major, minor = torch.cuda.get_device_capability(device)
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        target = {"FLASH_ATTENTION_ARCH": f"sm_{major}{minor}", "CUTE_DSL_ARCH": f"sm_{major}{minor}{'a' * (major >= 9)}",
                  "FLASH_ATTENTION_NUM_SMS": str(num_sms), "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
        kinds = {_kind(shape): shape for shape in shapes}
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_become, initargs=(target, folder))
        self._jobs = [self._pool.submit(compile_shape or compile_one, shape) for shape in kinds.values()]

    def wait(self, seconds: float) -> int:
        """How many kernels have been compiled; those that are not by then compile where they are first called."""
        end = time.monotonic() + seconds
        done = 0
        for job in self._jobs:
            try:
                job.result(timeout=max(0.0, end - time.monotonic()))
                done += 1
            except Exception as error:  # what does not compile says so where it is timed
                print(f"flash attention 4, ahead: {type(error).__name__} {error}"[:200], flush=True)
                if time.monotonic() > end:
                    break
        self.close()
        return done

    def close(self) -> None:
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
            for process in processes:
                process.kill()


def _become(target: dict[str, str], folder: Path) -> None:
    """In a worker: compiles for ``target`` and never looks at the GPU."""
    os.environ.update(target)
    if (why := load(folder)) is not None:
        raise RuntimeError(why)


def _kind(shape: Shape) -> tuple[Any, ...]:
    """Equal for problems of one kernel."""
    grouped = shape.num_heads_q // shape.num_heads_kv
    return shape.head_dim, shape.head_dim_v, shape.dtype, shape.causal, shape.window, shape.varlen, shape.page_size, grouped


def compile_one(shape: Shape) -> None:
    """In a worker: one call of fake tensors, which compiles and computes nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        contestant(InputSets(shrunk(shape, longest=SMALL, max_heads=64), torch.device("cuda"), real=False))(0)
