"""What flash_attn_with_kvcache is held to with an append and rotary embeddings, and its table in docs/performance.md."""

from __future__ import annotations

from benchmarks.markdown import times, us
from benchmarks.targets import Goal, Row, Verdict, host_us, microseconds, outcome

GRID = "kvcache"
APPEND, ROTARY, APART = "append", "append, rotary", "append, rotary, each launch by itself"
PROBLEM = "1x4096 32/8"
SLOWEST = 1.25  # times decode alone, with append and rotary
HOST_US = 30.0  # of such a call
_HEADS = {"flashtile": "decode alone", APPEND: "and append", ROTARY: "and rotary", APART: "each launch by itself"}


def of_decode_alone(row: Row) -> float | None:
    """The time with append and rotary over that of decode alone."""
    alone, whole = microseconds(row), microseconds(row, ROTARY)
    return whole / alone if alone and whole else None


def goals(rows: list[Row]) -> list[Goal]:
    """Both targets, with what the one problem that is held to them reaches."""
    row = next((row for row in rows if row["name"] == PROBLEM), {})
    share, host = of_decode_alone(row), host_us(row, ROTARY)
    return [
        Goal(f"{PROBLEM} after append and rotary, decode alone", f"<= {SLOWEST:.2f}x the time",
             "not measured" if share is None else f"{share:.2f}x the time", None if share is None else share <= SLOWEST, GRID),
        Goal(f"host time of flash_attn_with_kvcache with both, {PROBLEM}", f"<= {HOST_US:.0f} us",
             "not measured" if host is None else f"{host:.1f} us", None if host is None else host <= HOST_US, GRID),
    ]  # fmt: skip


def verdict(rows: list[Row]) -> Verdict | None:
    """How much longer a call takes than decode alone, over all problems."""
    shares = {row["name"]: share for row in rows if (share := of_decode_alone(row))}
    if not shares:
        return None
    most = max(shares, key=lambda name: shares[name])
    misses = [f"{goal.what}: {goal.reached}, target {goal.bar}" for goal in goals(rows) if goal.met is False]
    figure = f"append and rotary: {min(shares.values()):.2f}x to {shares[most]:.2f}x the time of decode alone, most at {most}"
    return Verdict(figure, tuple(misses + _untimed(rows)))


def _untimed(rows: list[Row]) -> list[str]:
    """Ways to call it that failed or were wrong; of decode alone the report tells itself."""
    results = [(row["name"], name, result) for row in rows for name, result in row.get("results", {}).items() if name != "flashtile"]
    return [f"{problem}, {name}: {outcome(result)}" for problem, name, result in results if result.keys() & {"wrong", "failed"}]


def columns(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """GPU and host time of each way to call it; a call is timed by both where the host's work is as large as the kernels'."""
    header = ["problem", "MB", *(f"{head} GPU / host" for head in _HEADS.values()), "append and rotary over decode alone"]
    cells = []
    for row in rows:
        pairs = [f"{us(microseconds(row, name))} / {us(host_us(row, name))}" for name in _HEADS]
        cells.append([row["name"], f"{row['kv_bytes'] / 1e6:.0f}", *pairs, times(of_decode_alone(row))])
    return header, cells
