"""Device: the figures of one GPU (or CPU) that the planner weighs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from flashtile.errors import ArgumentError, UnsupportedError, message
from flashtile.planner.figures import ARCHITECTURES, DATASHEETS, EXP_PER_CLOCK, KIB, MEASURED, MIB, REACHED, Architecture, Mma

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """Figures of one device; rates are what kernels reach, not what a datasheet promises.

    bandwidth in bytes/s; matrix_rate (16-bit inputs, float32 accumulation) and vector_rate (float32) in FLOP/s;
    exp_rate in exp2/s; launch_us in microseconds of GPU time for one more dependent kernel; sizes in bytes.
    """

    name: str
    backend: str  # "cuda", "hip" or "cpu"
    arch: str  # "sm_90", "gfx942", "cpu"
    num_sms: int
    smem_per_block: int
    smem_per_sm: int
    regs_per_sm: int
    max_warps_per_sm: int
    warp_size: int
    l2_bytes: int
    bandwidth: float
    matrix_rate: float
    vector_rate: float
    exp_rate: float
    launch_us: float

    @property
    def is_gpu(self) -> bool:
        return self.backend != "cpu"

    @property
    def architecture(self) -> Architecture:
        """What all devices of this architecture share; for an architecture never seen, its nearest older one."""
        return ARCHITECTURES[nearest_architecture(self.arch)]

    @property
    def mma_shapes(self) -> tuple[Mma, ...]:
        """The matrix instructions that Triton emits for it, preferred ones first; none on sm_75 and on a CPU."""
        return self.architecture.mmas if self.is_gpu else ()

    @property
    def has_mma(self) -> bool:
        return bool(self.mma_shapes)

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel's start can hide behind its predecessor's end (sm_90 and newer)."""
        return self.backend == "cuda" and _generation(self.arch) >= 90

    @classmethod
    def names(cls) -> list[str]:
        """Every name that ``named`` knows."""
        return [*DATASHEETS, "cpu"]

    @classmethod
    def named(cls, name: str) -> Device:
        """The device of that name; case, spaces, dashes and underscores do not count ("rtx-4090", "h200", "cpu")."""
        if _plain(name) == "cpu":
            return _cpu()
        found = cls.model(name)
        if found is not None:
            return found
        raise ArgumentError(message("device", f"one of {', '.join(cls.names())}", repr(name), "Case, spaces and dashes do not count."))

    @classmethod
    def model(cls, name: str) -> Device | None:
        """The GPU's model of that name, as ``named`` reads it; None where there is none."""
        return next((_listed(known) for known in DATASHEETS if _plain(known) == _plain(name)), None)

    @classmethod
    def of(cls, where: torch.device | torch.Tensor | str) -> Device:
        """The device that a tensor lies on, or that torch names. It never waits for the GPU."""
        import torch

        device = where.device if isinstance(where, torch.Tensor) else _torch_device(where)
        if device.type == "cpu":
            return _cpu()
        if device.type != "cuda":
            raise UnsupportedError(message("device", "a CUDA, ROCm or CPU device", device, "Move the tensors to one."))
        try:
            return _driver_device(torch.cuda.current_device() if device.index is None else device.index)
        except AssertionError as error:  # torch's word for a GPU that is not there
            expected = f"one of the {torch.cuda.device_count()} GPUs that torch finds here"
            raise UnsupportedError(message("device", expected, device, "Device.named knows models.")) from error

    @classmethod
    def from_properties(cls, properties: Any, backend: str) -> Device:
        """A GPU as its driver describes it (torch.cuda.get_device_properties); rates from the tables where they know it.

        A GPU that no table lists takes its rates from a listed one of its architecture, in proportion to the SMs.
        """
        arch = f"sm_{properties.major}{properties.minor}" if backend == "cuda" else str(properties.gcnArchName).split(":")[0]
        listed = _listed_in(properties.name, arch)
        base = _listed(listed or _relative(arch))
        shared = ARCHITECTURES[nearest_architecture(arch)]

        def told(field: str, default: int) -> int:
            return int(getattr(properties, field, 0) or default)

        num_sms = told("multi_processor_count", base.num_sms)
        warp_size = told("warp_size", shared.warp_size)
        threads = told("max_threads_per_multi_processor", shared.max_warps_per_sm * warp_size)
        scale = num_sms / base.num_sms
        return cls(
            name=properties.name,
            backend=backend,
            arch=arch,
            num_sms=num_sms,
            smem_per_block=told("shared_memory_per_block_optin", shared.smem_per_block),
            smem_per_sm=told("shared_memory_per_multiprocessor", shared.smem_per_sm),
            regs_per_sm=told("regs_per_multiprocessor", shared.regs_per_sm),
            max_warps_per_sm=threads // warp_size,
            warp_size=warp_size,
            l2_bytes=told("L2_cache_size", base.l2_bytes),
            bandwidth=_bandwidth(properties, backend, base, listed, scale),
            matrix_rate=base.matrix_rate * scale,
            vector_rate=base.vector_rate * scale,
            exp_rate=base.exp_rate * scale,
            launch_us=shared.launch_us,
        )


@cache
def nearest_architecture(arch: str) -> str:
    """The row of ARCHITECTURES for an architecture: itself, else the vendor's nearest older one, else its oldest."""
    if arch in ARCHITECTURES:
        return arch
    family = [known for known in ARCHITECTURES if known[:2] == arch[:2]] or ["sm_80"]
    older = [known for known in family if _generation(known) <= _generation(arch)]
    return max(older, key=_generation) if older else min(family, key=_generation)


@cache
def _listed(name: str) -> Device:
    row = DATASHEETS[name]
    shared = ARCHITECTURES[row.arch]
    rates = {field: getattr(row, field) * REACHED[field] for field in REACHED} | MEASURED.get(name, {})
    if not shared.mmas:
        rates["matrix_rate"] = rates["vector_rate"]
    return Device(
        name=name,
        backend="cuda" if row.arch.startswith("sm_") else "hip",
        arch=row.arch,
        num_sms=row.num_sms,
        smem_per_block=shared.smem_per_block,
        smem_per_sm=shared.smem_per_sm,
        regs_per_sm=shared.regs_per_sm,
        max_warps_per_sm=shared.max_warps_per_sm,
        warp_size=shared.warp_size,
        l2_bytes=row.l2_bytes,
        exp_rate=row.num_sms * EXP_PER_CLOCK * row.clock,
        launch_us=shared.launch_us,
        **rates,
    )


def _torch_device(where: torch.device | str) -> torch.device:
    """A device of torch's by its name. Raises ArgumentError where it is none."""
    import torch

    try:
        return torch.device(where) if isinstance(where, str | torch.device) else torch.device("")
    except RuntimeError:
        fix = "Device.named knows GPUs by their model."
        raise ArgumentError(message("device", "a tensor, or a device of torch's (cuda, cuda:1, cpu)", repr(where), fix)) from None


@cache
def _driver_device(index: int) -> Device:
    import torch

    return Device.from_properties(torch.cuda.get_device_properties(index), "hip" if torch.version.hip else "cuda")


def _cpu() -> Device:
    """The CPU with as many threads as torch uses now: read each time, for a caller may change it."""
    try:
        import torch

        threads = torch.get_num_threads()
    except ImportError:  # explaining a plan needs no torch
        threads = os.cpu_count() or 1
    return _cpu_with(threads)


@cache
def _cpu_with(threads: int) -> Device:
    """Sensible figures of a server core: 1 MB of L2, 10 GB/s, and AVX2 at 3 GHz (32 float32 operations a clock), half reached."""
    device = Device(
        name="cpu", backend="cpu", arch="cpu", num_sms=threads, smem_per_block=32 * KIB, smem_per_sm=32 * KIB, regs_per_sm=0,
        max_warps_per_sm=1, warp_size=1, l2_bytes=MIB, bandwidth=10e9, matrix_rate=48e9, vector_rate=24e9, exp_rate=1e9, launch_us=5.0,
    )  # fmt: skip
    rates = {field: getattr(device, field) * threads for field in ("bandwidth", "matrix_rate", "vector_rate", "exp_rate", "l2_bytes")}
    return replace(device, **rates)


def _bandwidth(properties: Any, backend: str, base: Device, listed: str | None, scale: float) -> float:
    """The driver's memory clock and bus width, where they contradict the table (another memory under the same name).

    A ROCm driver's clock means different things for different memories, so there the table stands.
    """
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    if backend != "cuda" or not clock or not width:
        return base.bandwidth * (1.0 if listed else scale)
    peak = 2 * clock * 1e3 * width / 8
    if listed and 0.9 < peak / DATASHEETS[listed].bandwidth < 1.1:
        return base.bandwidth
    return float(peak * REACHED["bandwidth"])


def _listed_in(name: str, arch: str) -> str | None:
    """The listed device whose name stands in the driver's ("NVIDIA H200" holds "H200"), longest name first."""
    for known in sorted(DATASHEETS, key=len, reverse=True):
        pattern = rf"(?<![a-z0-9]){re.escape(known.lower())}(?![a-z0-9])"
        if DATASHEETS[known].arch == arch and re.search(pattern, name.lower()):
            return known
    return None


def _relative(arch: str) -> str:
    """A listed device of the architecture, or of the nearest older one that has any, or of the vendor's oldest."""
    family = [name for name, row in DATASHEETS.items() if row.arch[:2] == arch[:2]] or ["A100"]
    older = [name for name in family if _generation(DATASHEETS[name].arch) <= _generation(arch)]
    return max(older or family[:1], key=lambda name: _generation(DATASHEETS[name].arch))


@cache
def _generation(arch: str) -> int:
    """A number that grows with an architecture's age: sm_90 is 90, gfx942 is 0x942."""
    digits = arch.partition("_")[2] if arch.startswith("sm_") else arch.removeprefix("gfx")
    try:
        return int(digits, 10 if arch.startswith("sm_") else 16)
    except ValueError:
        return 0


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", str(name)).lower()
