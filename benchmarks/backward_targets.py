"""What backward attention is held to on one H200, and what misses it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.bars import Bar, of_head_dims
from benchmarks.targets import Goal, Row, microseconds

FASTEST = "the faster of cuDNN and FA4"
BOTH = ("cudnn", "fa4")
LINEAR = 0.05  # how far any problem's bytes may lie from a straight line
MANY_TIMES = 4  # the longest sequence of the shortest, at least, before memory says anything


def speed_beside(row: Row, against: tuple[str, ...]) -> float | None:
    """Operations a second over those of the problem timed beside."""
    own, other = microseconds(row), microseconds(row, "beside")
    return (row["flops"] / own) / (row["beside"]["flops"] / other) if own and other else None


BARS = (
    Bar("head dims 128 and 64, full and causal", "dense", BOTH, FASTEST, 0.93, 1.0, of_head_dims(128, 64)),
    Bar("head dims 128 and 64, full and causal", "dense", ("cudnn",), "cuDNN", None, 1.08, of_head_dims(128, 64)),
    Bar("head dim 256", "wide", BOTH, FASTEST, None, 1.15),
    Bar("the same bits each time, head dims 128 and 64", "deterministic", ("cudnn",), "cuDNN", None, 1.0),
    Bar("32/8 heads, head dim 128", "gqa", ("beside",), "32/32 heads", 0.97, figure=speed_beside),
    Bar("64 sequences of log-uniform lengths, causal", "varlen", ("beside",), "an even batch", 0.9, figure=speed_beside),
    Bar("the portable kernel, head dim 128", "portable", ("torch_flash",), "FA2 (torch)", None, 1.0),
    Bar("a Llama-like block, compiled, 4 x 4096", "block", ("cudnn",), "with SDPA's cuDNN", 1.0),
)
RIVALS_OF = {
    "dense": BOTH, "wide": BOTH, "deterministic": ("cudnn",), "gqa": ("beside",), "varlen": ("beside",), "portable": ("torch_flash",),
    "block": ("cudnn",), "dims": BOTH,
}  # fmt: skip
FIGURE_OF = {bar.grid: bar.figure for bar in BARS}


@dataclass(frozen=True)
class Line:
    """The straight line that is nearest to bytes over lengths: ``fixed`` + ``a_token`` * length; ``off`` is its largest relative error."""

    fixed: float
    a_token: float
    off: float


def line_through(points: list[tuple[int, float]]) -> Line:
    """Least squares of relative errors, so that short sequences count as much as long ones; at least two points."""
    weights = [(1.0 / amount, length / amount) for length, amount in points]
    aa, ab, bb = (sum(one[i] * one[j] for one in weights) for i, j in ((0, 0), (0, 1), (1, 1)))
    ya, yb = (sum(one[i] for one in weights) for i in (0, 1))
    scale = aa * bb - ab * ab
    fixed, a_token = (ya * bb - yb * ab) / scale, (yb * aa - ya * ab) / scale
    return Line(fixed, a_token, max(abs((fixed + a_token * length) / amount - 1.0) for length, amount in points))


def peaks(rows: list[Row], name: str = "flashtile") -> list[tuple[int, float]]:
    """Tokens of a sequence and peak bytes of a step, of one contestant."""
    found = [(row["seqlens_q"]["max"], row.get("results", {}).get(name, {}).get("peak_bytes")) for row in rows if "seqlens_q" in row]
    return [(length, float(peak)) for length, peak in found if peak]


def goals(results: dict[str, list[Row]]) -> list[Goal]:
    """Every target with what the rows of its grid reach."""
    return [*(bar.judge(results.get(bar.grid, [])) for bar in BARS), _memory(results.get("memory", []))]


def _memory(rows: list[Row]) -> Goal:
    what, words = "memory of a training step, a straight line over the length", f"within {LINEAR:.0%}"
    points = peaks(rows)
    lengths = [length for length, _ in points]
    if len(points) < 3 or max(lengths) < MANY_TIMES * min(lengths):
        return Goal(what, words, "not measured", None, "memory")
    line = line_through(points)
    reached = f"{line.a_token / 1024:.1f} KiB a token from {min(lengths)} to {max(lengths)}, within {line.off:.1%}"
    return Goal(what, words, reached, line.off <= LINEAR, "memory")


def misses(grid: str, rows: list[Row]) -> list[str]:
    """The problems of one grid that are below a target."""
    return [miss for bar in BARS if bar.grid == grid for miss in bar.misses(rows)]
