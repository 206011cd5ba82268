"""Calls that come again are repeated without Python: the third of a kind is recorded, later ones are launched by ``replay.c``.

A call's key holds everything but the addresses of its tensors, so a call with a known key launches the same kernels with
the same numbers. Recording runs the runner once more with a Recorder in the place of the stream: launches are noted down
instead of made, and pointers are traced to the tensors that they belong to. A runner that does anything else (an operation
of torch's, a pointer to memory of its own) is not repeated: its calls take the longer way each time.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashtile.kernels import native
from flashtile.kernels.block import Block, Kernel, NotReplayable, block_of
from flashtile.kernels.call import AppendCall, DecodeCall, ForwardCall

Call = DecodeCall | ForwardCall | AppendCall

RECORDED_CALL = 3  # of a kind: recording costs what some five repeated calls save, and a cache that grows has few calls of a kind
MAX_KINDS = 1024  # of calls of an operation, each of some 6 kB
_BY_STREAM = -5  # the source of memory that launches of a stream share, and of which replay.c looks up the address
_OF_STREAM = 8  # stands for that address while a call is recorded: no tensor lies there


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stands in the stream's place: launch functions note down what they would launch. Sees torch's operations meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[tuple[Kernel, int, int, tuple[Any, ...]]] = []
        self.scratch: list[torch.Tensor] = []
        self.by_stream: dict[int, int] | None = None

    def note(self, kernel: Kernel | None, grid_x: int, grid_y: int, args: tuple[Any, ...]) -> None:
        if kernel is None:
            raise NotReplayable("a kernel that only Triton knows how to launch")
        self.launches.append((kernel, grid_x, grid_y, args))

    def memory_of_stream(self, addresses: dict[int, int]) -> int:
        """In the place of an address that ``addresses`` has for each stream: the one of the stream that a call is repeated on.

        A stream that it does not have takes the longer way, and so does one that is captured into a graph.
        """
        if self.by_stream is not None and self.by_stream is not addresses:
            raise NotReplayable("several kinds of memory by stream")
        self.by_stream = addresses
        return _OF_STREAM

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.scratch.append(result)
        elif not func.is_view:
            raise NotReplayable(f"the runner calls {func}")
        return result


def record(run: Callable[[Any, Any], None], key: bytes, device: int, args: tuple[Any, ...], call: Call) -> Any:
    """The Replay of a call that has just been run; ``args`` are what ``key`` was made of. Raises NotReplayable.

    An out or lse that is not among ``args`` was allocated, and a repeated call allocates its own.
    """
    recorder = Recorder()
    with recorder:
        run(recorder, call)
    given = [i for i, arg in enumerate(args) if arg is call.out]
    made = [tensor for tensor in (None if given else call.out, call.lse) if tensor is not None]
    buffers = [*made, *recorder.scratch]
    sources = _Sources(args, buffers)
    launches = tuple(
        _launch(kernel, grid_x, grid_y, block_of(kernel, values), sources) for kernel, grid_x, grid_y, values in recorder.launches
    )
    if not launches or any(grid_x < 1 or grid_y < 1 for _, grid_x, grid_y, _ in recorder.launches):
        raise NotReplayable("nothing is launched")
    keep = tuple(arg for arg in args if not isinstance(arg, torch.Tensor))
    out = -1 - given[0] if given else 0
    lse = -1 if call.lse is None else len(made) - 1
    return native.module().Replay(key, device, launches, tuple(_hollow(buffer) for buffer in buffers), out, lse, keep, recorder.by_stream)


class _Sources:
    """Whose address a pointer is: argument ``i`` is i, buffer ``i`` is -1 - i, the stream's memory _BY_STREAM."""

    def __init__(self, args: tuple[Any, ...], buffers: list[torch.Tensor]) -> None:
        tensors = [(i, arg) for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
        tensors += [(-1 - i, buffer) for i, buffer in enumerate(buffers)]
        self.owners: dict[int, list[int]] = {}
        for source, tensor in tensors:
            self.owners.setdefault(tensor.data_ptr(), []).append(source)
        self.spans = [(source, tensor.data_ptr(), tensor.nbytes) for source, tensor in tensors if source < 0]

    def of(self, address: int) -> tuple[int, int]:
        """(source, bytes from its start). Only within a buffer may a pointer stand elsewhere than at the start."""
        if address == _OF_STREAM:
            return _BY_STREAM, 0
        owners = self.owners.get(address, [])
        if len(owners) == 1 or (owners and owners[0] >= 0 and owners[-1] >= 0):
            return owners[0], 0  # of arguments at one address, which the key tells, any
        for source, start, size in self.spans:
            if start < address < start + size:
                return source, address - start
        raise NotReplayable("several tensors at one address" if owners else "a pointer to memory that is no argument's")


def _launch(kernel: Kernel, grid_x: int, grid_y: int, block: Block, sources: _Sources) -> tuple[Any, ...]:
    patches = tuple((offset, *sources.of(address), in_map) for offset, address, in_map in block.pointers)
    return (
        kernel.function, grid_x, grid_y, kernel.threads, kernel.shared, kernel.dependent, kernel.cooperative, block.bytes,
        block.offsets, patches,
    )  # fmt: skip


def _hollow(buffer: torch.Tensor) -> torch.Tensor:
    """A tensor like this one that holds no memory. To allocate like a tensor is torch's shortest way: there is little to read."""
    hollow = torch.empty_like(buffer)
    hollow.untyped_storage().resize_(0)
    return hollow


class Replays:
    """Which kinds of calls were seen, and the table of those that are recorded. Thread-safe."""

    def __init__(self, table: Any) -> None:
        self.run: Callable[..., tuple[torch.Tensor, torch.Tensor | None] | None] = table.run
        self._table = table
        self._seen: dict[bytes, int] = {}  # calls of each kind, up to the one that is recorded
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Kinds of calls that are repeated."""
        return len(self._table)

    def note(self, run: Callable[[Any, Any], None], device: int, args: tuple[Any, ...], call: Call) -> None:
        """Notes a call that has just been run on ``device``, which is current, and records it if that is worth it."""
        key = self._table.key(*args)
        if key is None:
            return
        with self._lock:
            times = self._seen.get(key, 0) + 1
            if times > RECORDED_CALL:
                return
            if len(self._seen) >= MAX_KINDS:
                self._seen.clear()
                self._table.clear()
            self._seen[key] = times
            if times < RECORDED_CALL:
                return
        with contextlib.suppress(NotReplayable):  # then its calls take the longer way from now on
            self._table.add(record(run, key, device, args, call))


class DeviceRunner:
    """Runs ``run(stream, call)`` with its device current, on that device's current stream; and notes calls to be repeated."""

    __slots__ = ("_current_device", "_current_stream", "_index", "_run")

    def __init__(self, run: Callable[[Any, Any], None], index: int) -> None:
        self._run, self._index = run, index
        self._current_device, self._current_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

    def __call__(self, call: Any) -> None:
        if self._current_device() == self._index:
            self._run(self._current_stream(self._index), call)
        else:
            with torch.cuda.device(self._index):
                self._run(self._current_stream(self._index), call)

    def note(self, args: tuple[Any, ...], call: Call) -> Callable[..., Any] | None:
        """Notes that ``call``, made of ``args``, has just been run. What it returns repeats a noted call of the same args."""
        replays = cuda_replays(call.__class__)  # type: ignore[arg-type]  # a class of tuples is hashable
        if replays is None or self._current_device() != self._index:
            return None
        replays.note(self._run, self._index, args, call)
        return replays.run


@functools.lru_cache(maxsize=8)
def cuda_replays(operation: type[Call]) -> Replays | None:
    """This process's recorded calls of an operation, by its class of calls, on GPUs; None where they cannot be repeated."""
    table = native.cuda_table()
    return None if table is None else Replays(table)
