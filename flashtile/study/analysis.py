"""What follows from a study: the best query tile of each problem, what a fixed one loses, what wasted rows cost, splits, bounds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flashtile.planner.resources import product_rate
from flashtile.planner.tiles import variant_name
from flashtile.study.document import Document, Entry
from flashtile.study.points import Point
from flashtile.study.rows import Row

FIXED_BLOCK_M = 64  # of the kernels that have a single query tile in the split phase
NOISE = 0.01  # relative differences below this, or below both spreads, decide nothing


@dataclass(frozen=True)
class Verdict:
    """One problem of the study: its fastest plan, the fastest of each query tile, and what the planner's choice and 64 rows lose.

    Losses are relative to the best time (0.1 is 10 % longer), None where that plan was not timed. ``unlike_loss`` is the choice's against
    the best plan that holds up where a batch's lengths differ, which is what the planner has to reckon with.
    """

    point: Point
    best: Row
    by_block_m: dict[int, Row]
    planner_loss: float | None
    fixed_loss: float | None
    unlike_loss: float | None

    @property
    def best_in_words(self) -> str:
        return f"{variant_name(self.best.block_m, self.best.swapped)} of {self.best.kernel}"

    @property
    def rows(self) -> int:
        return self.point.seqlen_q * self.point.group

    def ties(self) -> list[int]:
        """The query tiles whose fastest plan the spread does not tell from the best."""
        return [block_m for block_m, row in sorted(self.by_block_m.items()) if tied(row, self.best)]


def tied(row: Row, best: Row) -> bool:
    """Whether two times differ by no more than both spreads, or than NOISE."""
    return row.us <= best.us * (1 + max(NOISE, row.spread + best.spread))


def verdicts(document: Document) -> list[Verdict]:
    """A verdict for each problem whose query tiles were tried, in the order of the study."""
    return [_verdict(entry) for entry in document.of_stage("tiles") if entry.rows]


def _verdict(entry: Entry) -> Verdict:
    best = min(entry.rows, key=lambda row: row.us)
    by_block_m = fastest_of(entry.rows)
    chosen, fixed = entry.chosen, by_block_m.get(FIXED_BLOCK_M)
    steady = [row for row in entry.rows if holds_for_unlike_lengths(entry.point, row)]
    unlike_loss = _loss(chosen, min(steady, key=lambda row: row.us)) if steady else None
    return Verdict(entry.point, best, by_block_m, _loss(chosen, best), _loss(fixed, best), unlike_loss)


def holds_for_unlike_lengths(point: Point, row: Row) -> bool:
    """Whether a plan balances a batch whose lengths differ: its programs share all keys evenly. A lone sequence has nothing to balance.

    A grid gives each sequence as many programs, however long it is.
    """
    return point.batch == 1 or row.num_programs > 0


def _loss(row: Row | None, best: Row) -> float | None:
    return None if row is None else row.us / best.us - 1


def fastest_of(rows: Iterable[Row]) -> dict[int, Row]:
    """The fastest row of each block_m, of any kernel."""
    found: dict[int, Row] = {}
    for row in rows:
        if row.block_m not in found or row.us < found[row.block_m].us:
            found[row.block_m] = row
    return found


def best_map(document: Document, batch: int, keys: int, head_dim: int = 128, kernel: str = "") -> dict[tuple[int, int], Verdict]:
    """(seqlen_q, group) -> verdict, of one regime and one head dim of 16-bit caches; of one kernel's plans where it is named."""
    found = {}
    for entry in document.of_stage("tiles"):
        point, rows = entry.point, tuple(row for row in entry.rows if kernel in ("", row.kernel))
        if (point.batch, point.keys, point.head_dim, point.quantised) == (batch, keys, head_dim, False) and rows:
            found[point.seqlen_q, point.group] = _verdict(Entry(entry.stage, point, rows, entry.choice, entry.refused))
    return found


@dataclass(frozen=True)
class Waste:
    """A query tile at a problem: the share of its rows that are empty, and its fastest time over that of the fullest tile."""

    point: Point
    block_m: int
    wasted: float
    slowdown: float


def wasted_rows(document: Document, kernel: str = "") -> list[Waste]:
    """Every query tile of 8 rows and more at every problem: empty rows in share of all, against time over the best query tile's."""
    found = []
    for entry in document.of_stage("tiles"):
        tiles = fastest_of(row for row in entry.rows if row.block_m >= 8 and kernel in ("", row.kernel))
        if len(tiles) < 2:
            continue
        rows, best = entry.point.seqlen_q * entry.point.group, min(row.us for row in tiles.values())
        for block_m, row in sorted(tiles.items()):
            held = -(-rows // block_m) * block_m
            found.append(Waste(entry.point, block_m, (held - rows) / held, row.us / best))
    return found


def split_curves(document: Document, point: Point) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """(kernel, block_m) -> (splits, microseconds) in order, of the grids that were timed at a point."""
    curves: dict[tuple[str, int], dict[int, float]] = {}
    for entry in document.of_stage("splits"):
        for row in entry.rows if entry.point == point else ():
            if not row.num_programs and not row.swapped:
                curve = curves.setdefault((row.kernel, row.block_m), {})
                curve[row.num_splits] = min(row.us, curve.get(row.num_splits, row.us))
    return {name: sorted(curve.items()) for name, curve in curves.items()}


@dataclass(frozen=True)
class Bounds:
    """What a problem takes at least, in microseconds: reading its keys once, and multiplying; and its best time."""

    point: Point
    memory_us: float
    matrix_us: float
    best_us: float

    @property
    def intensity(self) -> float:
        """Multiplications and additions a byte of keys and values."""
        return self.point.problem.flops / self.point.kv_bytes

    @property
    def bound(self) -> str:
        """ "memory" or "matrix", whichever takes longer; "latency" where neither is half of the best time."""
        most = max(self.memory_us, self.matrix_us)
        return "latency" if most < 0.5 * self.best_us else "memory" if most == self.memory_us else "matrix"

    @property
    def reached(self) -> float:
        """The roofline's share of the best time."""
        return max(self.memory_us, self.matrix_us) / self.best_us


def roofline(document: Document) -> list[Bounds]:
    """The bounds of every problem, by the figures of the device that was studied."""
    device, found = document.figures, []
    for verdict in verdicts(document):
        point = verdict.point
        matrix_us = 1e6 * point.problem.flops / product_rate(point.problem, device)
        found.append(Bounds(point, 1e6 * point.kv_bytes / device.bandwidth, matrix_us, verdict.best.us))
    return found


def percentile(ordered: list[float], percent: int) -> float:
    """The smallest value that ``percent`` of an ascending list do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -(-percent * len(ordered) // 100) - 1))]
