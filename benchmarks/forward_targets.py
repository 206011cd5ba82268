"""What forward attention is held to on one H200, and what misses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.targets import Goal, Row, geometric_mean, host_us, microseconds, ratio

RIVALS = ("cudnn", "fa3", "fa4")
CPU_PROBLEM = "1x1024"


@dataclass(frozen=True)
class Bar:
    """How many times as fast as the fastest of some peers: at least ``each`` on every problem, ``mean`` in geometric mean."""

    what: str
    grid: str
    against: tuple[str, ...]
    whom: str
    each: float | None = None
    mean: float | None = None
    of: Callable[[Row], bool] = lambda row: True

    @property
    def words(self) -> str:
        each = "" if self.each is None else f">= {self.each:.2f}x" + (" on each" if self.mean is not None else "")
        mean = "" if self.mean is None else f">= {self.mean:.2f}x in geometric mean"
        return ", ".join(part for part in (each, mean) if part)

    def judge(self, rows: list[Row]) -> Goal:
        ratios = {row["name"]: value for row in rows if self.of(row) and (value := ratio(row, self.against))}
        what = f"{self.what}, {self.whom}"
        if not ratios:
            return Goal(what, self.words, "not measured", None, self.grid)
        values = list(ratios.values())
        lowest = min(ratios, key=lambda name: ratios[name])
        average = geometric_mean(values)
        met = (self.each is None or values == [value for value in values if value >= self.each]) and (
            self.mean is None or average >= self.mean
        )
        where = f"lowest {ratios[lowest]:.3f}x at {lowest}"
        reached = f"{ratios[lowest]:.3f}x" if len(values) == 1 else f"{average:.3f}x over {len(values)}, {where}"
        return Goal(what, self.words, reached, met, self.grid)

    def misses(self, rows: list[Row]) -> list[str]:
        """Problems below ``each``, by name."""
        below = [(row["name"], value) for row in rows if self.of(row) and (value := ratio(row, self.against)) and value < (self.each or 0)]
        return [f"{name}: {value:.3f}x {self.whom}, target {self.each:.2f}x" for name, value in below]


def _head_dim(head_dim: int) -> Callable[[Row], bool]:
    return lambda row: row.get("head_dim") == head_dim


FASTEST = "the fastest of cuDNN, FA3 and FA4"
BARS = (
    Bar("head dim 128, full and causal", "dense", RIVALS, FASTEST, 1.0, 1.06, _head_dim(128)),
    Bar("the same on data that rescales", "rescale", RIVALS, FASTEST, 1.0, 1.06),
    Bar("head dim 64, full and causal", "dense", RIVALS, FASTEST, 0.97, 1.03, _head_dim(64)),
    Bar("head dim 256, full and causal", "dense", RIVALS, FASTEST, 0.97, 1.0, _head_dim(256)),
    Bar("head dims 96, 192 and 192/128", "dims", RIVALS, FASTEST, 0.97),
    Bar("32/8 and 16/1 heads, head dim 128", "gqa", RIVALS, FASTEST, 1.0, 1.06),
    Bar("512 queries on 16k cached keys, pages of 16", "chunked", ("beside",), "the same without pages", 0.9),
    Bar("512 queries on 16k cached keys, pages of 16", "chunked", ("fa3",), "FA3", 1.0),
    Bar("64 sequences of log-uniform lengths, causal", "varlen", ("fa3",), "FA3", 1.05),
    Bar("a window of 1024", "window", ("fa3",), "FA3", 1.0),
    Bar("the portable kernel, head dim 128", "portable", ("torch_flash",), "FA2 (torch)", None, 1.25),
    Bar("a CPU, 1 x 1024, 8 heads of 128", "cpu", ("sdpa",), "torch SDPA", 0.95, None, lambda row: CPU_PROBLEM in row["name"]),
)
HOST_US = 25.0
RIVALS_OF = {bar.grid: tuple(dict.fromkeys(name for other in BARS if other.grid == bar.grid for name in other.against)) for bar in BARS}


def goals(results: dict[str, list[Row]]) -> list[Goal]:
    """Every target with what the rows of its grid reach."""
    return [*(bar.judge(results.get(bar.grid, [])) for bar in BARS), _host(results.get("host", []))]


def _host(rows: list[Row]) -> Goal:
    times = [us for row in rows if (us := host_us(row))]
    reached = f"{min(times):.1f} to {max(times):.1f} us" if times else "not measured"
    return Goal("host time of a call", f"<= {HOST_US:.0f} us", reached, max(times) <= HOST_US if times else None, "host")


def misses(grid: str, rows: list[Row]) -> list[str]:
    """The problems of one grid that are below a target."""
    if grid == "host":
        return [f"{row['name']}: {us:.1f} us, target {HOST_US:.0f}" for row in rows if (us := host_us(row)) and us > HOST_US]
    return [miss for bar in BARS if bar.grid == grid for miss in bar.misses(rows)]


def tflops(row: Row, name: str = "flashtile") -> float | None:
    """Multiplications and additions over visible pairs a second, in 10^12."""
    us = microseconds(row, name)
    return row["flops"] / us * 1e-6 if us else None
