"""What forward attention is held to on one H200, and what misses it."""

from __future__ import annotations

from benchmarks.bars import Bar, of_head_dims
from benchmarks.targets import Goal, Row, host_us

RIVALS = ("cudnn", "fa3", "fa4")
CPU_PROBLEM = "1x1024"


FASTEST = "the fastest of cuDNN, FA3 and FA4"
BARS = (
    Bar("head dim 128, full and causal", "dense", RIVALS, FASTEST, 1.0, 1.06, of_head_dims(128)),
    Bar("the same on data that rescales", "rescale", RIVALS, FASTEST, 1.0, 1.06),
    Bar("head dim 64, full and causal", "dense", RIVALS, FASTEST, 0.97, 1.03, of_head_dims(64)),
    Bar("head dim 256, full and causal", "dense", RIVALS, FASTEST, 0.97, 1.0, of_head_dims(256)),
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
