"""What a compiler made of a kernel: registers, spills, shared memory and the matrix instructions it emitted. Needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from flashtile.errors import ArgumentError, message
from flashtile.kernels.launch import compile_spec
from flashtile.kernels.spec import Spec


@dataclass(frozen=True)
class CompiledFacts:
    """registers a thread; bytes a thread that spills store to memory; shared memory a block in bytes; the commonest matrix
    instruction ("" where none).

    ``warps_per_cta`` is the warps' arrangement over the first product: (rows, keys), or (keys, rows) where operands are
    swapped; empty where there is no matrix instruction.
    """

    arch: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    mma: str
    warps_per_cta: tuple[int, ...]


def target_of(arch: str) -> GPUTarget:
    """The compiler's target for "sm_90" or "gfx942"."""
    if match := re.fullmatch(r"sm_(\d+)a?", arch):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx9\w+", arch):
        return GPUTarget("hip", arch, 64)
    if re.fullmatch(r"gfx\w+", arch):
        return GPUTarget("hip", arch, 32)
    raise ArgumentError(message("arch", 'an architecture like "sm_90" or "gfx942"', repr(arch), "Device.named(...).arch gives one."))


def compile_facts(spec: Spec, arch: str) -> CompiledFacts:
    """Compiles ``spec`` for ``arch`` and reads the facts out of the binary."""
    target = target_of(arch)
    compiled = compile_spec(spec, target)
    if target.backend == "hip":
        registers, spilled, mma = _amd_facts(compiled.asm["amdgcn"])
    else:
        registers, spilled = _nvidia_resources(compiled.asm["cubin"])
        mma = _mma_name(
            compiled.asm["ptx"], r"\b(wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)|mma\.sync\.aligned\.(m\d+n\d+k\d+)|tcgen05\.mma)"
        )
    return CompiledFacts(arch, registers, spilled, compiled.metadata.shared, mma, _warps_per_cta(compiled.asm["ttgir"]))


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes). A stack alone is no spill: what counts is what the code stores in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
        if not found:
            raise RuntimeError(f"cuobjdump printed no resource usage: {usage}")
        registers, stack, local = (int(figure) for figure in found.groups())
        return registers, _bytes_stored_locally(_cuobjdump("-sass", file.name)) if stack + local else 0


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def _bytes_stored_locally(sass: str) -> int:
    """What all local stores of a listing write once each: STL is 4 bytes, STL.64 is 8, STL.128 is 16."""
    widths = re.findall(r"\bSTL(?:\.(?!64|128)\w+)*(?:\.(64|128))?", sass)
    return sum(int(width or 32) // 8 for width in widths)


def _amd_facts(assembly: str) -> tuple[int, int, str]:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    # what spills into accumulation registers never reaches memory
    return figure("vgpr_count"), figure("private_segment_fixed_size"), _mma_name(assembly, r"\b(v_mfma_\w+|v_wmma_\w+)")


def _mma_name(text: str, pattern: str) -> str:
    """The commonest matrix instruction, shortened: "wgmma m64n64k16", "mma.sync m16n8k16", "" for none."""
    names: Counter[str] = Counter()
    for match in re.finditer(pattern, text):
        whole, *shapes = match.groups()
        shape = next((s for s in shapes if s), "")
        kind = "wgmma" if whole.startswith("wgmma") else "mma.sync" if whole.startswith("mma.sync") else whole
        names[f"{kind} {shape}".strip()] += 1
    return names.most_common(1)[0][0] if names else ""


def _warps_per_cta(ttgir: str) -> tuple[int, ...]:
    """How the first matrix product lays its warps over the result; empty where there is none."""
    found = re.search(r"#(?:ttg|triton_gpu)\.(?:nvidia_mma|amd_mfma|amd_wmma)<\{[^}]*?warpsPerCTA = \[([\d, ]+)\]", ttgir)
    return tuple(int(n) for n in found[1].split(",")) if found else ()
