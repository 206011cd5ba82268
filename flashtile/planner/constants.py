"""What a decode kernel's steps cost, as data: ``costs/<device>.json``, one file for each GPU that was measured.

A GPU without one takes FALLBACK's: the model scales most of them by the device's own figures (``planner/device.py``).
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

from flashtile.errors import ArgumentError, message

FALLBACK = "H200"


class Constants(NamedTuple):
    """One named number for each thing that takes time; microseconds, or shares where the name says so."""

    start_us: dict[str, float]  # by kernel: launch of the first kernel, reading lengths, writing out
    sm_bandwidth_share: dict[str, float]  # by kernel: one SM reads at most this many times its even share of the bandwidth
    dram_latency_us: float  # from asking for the first tile until it is there
    l2_bandwidth_share: float  # re-reads by other row blocks hit L2, which is this much faster than DRAM
    matrix_iteration_us: float  # dependent chain of one key tile: product, row statistics, product
    row_fragment_us: float  # each further 16 rows of a warp's chain, where one instruction does not hold them all
    vector_iteration_us: float  # the same with sums across threads instead of matrix instructions
    swapped_iteration_us: float  # row statistics cross warps, probabilities change layout on the way to the second product
    swapped_score_factor: float  # vector instructions a score when statistics run along the instruction's large side
    extra_warp_us: float  # each warp beyond four, once a program: barriers and reductions across warps
    score_operations: float  # vector instructions a score: scale, mask, maximum, sum, conversion
    vector_key_operations: float  # vector instructions a key element and row in place of the matrix product
    quantised_key_operations: float  # vector instructions an element of quantised keys and values: to float16,
    quantised_operand_operations: dict[str, float]  # and by kernel, to where a matrix instruction wants it
    fma_efficiency: float  # share of the vector rate that an FMA dot reaches
    overlap_loss: float  # share of what runs beside the bound that shows all the same
    combine_us: float  # reading the first partial, writing out; programs that merge wait for the first partial as long
    combine_split_us: float  # each further split; and of programs that merge what they share, each further part

    def flat(self) -> dict[str, float]:
        """Every number by its name: "dram_latency_us", "start_us triton.decode"."""
        found: dict[str, float] = {}
        for name, value in self._asdict().items():
            found |= {f"{name} {kernel}": number for kernel, number in value.items()} if isinstance(value, dict) else {name: value}
        return found

    @classmethod
    def of_flat(cls, numbers: dict[str, float]) -> Constants:
        """The constants whose ``flat`` these are."""
        fields: dict[str, Any] = {}
        for name, number in numbers.items():
            field, _, kernel = name.partition(" ")
            if kernel:
                fields.setdefault(field, {})[kernel] = number
            else:
                fields[field] = number
        return cls(**fields)


@lru_cache(maxsize=64)
def constants_of(device_name: str) -> Constants:
    """The constants of the GPU of that name ("H200", "NVIDIA H200"); FALLBACK's where nobody has measured it."""
    folder = resources.files("flashtile.planner") / "costs"
    measured = {file.name.removesuffix(".json"): file for file in folder.iterdir() if file.name.endswith(".json")}
    known = next((name for name in measured if f" {name.lower()} " in f" {device_name.lower()} "), FALLBACK)
    return read_constants(measured[known].read_text(encoding="utf-8"))


def read_constants(text: str) -> Constants:
    """The constants in a file's JSON text; raises ArgumentError where a name is missing or unknown."""
    try:
        return Constants(**json.loads(text)["constants"])
    except (ValueError, KeyError, TypeError) as error:
        expected = f"JSON with constants {', '.join(Constants._fields)}"
        raise ArgumentError(message("constants", expected, f"{type(error).__name__}: {error}", "benchmarks/fit.py writes it.")) from error
