"""What the figures are held to, and what misses it."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from typing import Any

Row = dict[str, Any]
RIVALS = ("fa2", "fa3", "flashinfer_tc", "flashinfer_cc", "cudnn", "torch_flash")
SEQLEN1_MEAN, SEQLEN1_EACH = 1.10, 0.97
SPECULATIVE_FA3, SPECULATIVE_BEST = 1.05, 1.00
PAGED = {16: 0.97, 1: 0.85}
RAGGED = 0.90
FLOOR, FLOOR_BYTES = 0.95, 512_000_000
REGRET_MOST, REGRET_SHARE, REGRET_ALL = 0.03, 0.90, 0.08
HOST_ENTRY, HOST_GPU_US, HOST_US = "1x512 32/8", 5.5, 20.0
CPU_ENTRY, CPU_RATIO, CPU_EACH, CPU_LEAST_US = "1x4096 32/8", 5.0, 0.95, 100.0


@dataclass(frozen=True)
class Verdict:
    """One target's figure in words, and the rows that miss it."""

    figure: str
    misses: tuple[str, ...] = ()


def microseconds(row: Row, name: str = "flashtile") -> float | None:
    value = row.get("results", {}).get(name, {}).get("gpu_us")
    return float(value) if value else None


def best_rival(row: Row, among: tuple[str, ...] = RIVALS) -> tuple[str, float] | None:
    """The fastest peer on one problem and its microseconds."""
    timed = {name: us for name in among if (us := microseconds(row, name))}
    if not timed:
        return None
    name = min(timed, key=lambda peer: timed[peer])
    return name, timed[name]


def ratio(row: Row, among: tuple[str, ...] = RIVALS) -> float | None:
    """How many times as fast as the best peer."""
    rival, own = best_rival(row, among), microseconds(row)
    return rival[1] / own if rival and own else None


def beside_ratio(row: Row) -> float | None:
    """Speed (bytes a second) over that of the problem timed beside."""
    own, other = microseconds(row), microseconds(row, "beside")
    if not own or not other:
        return None
    return (row["kv_bytes"] / own) / (row["beside"]["kv_bytes"] / other)


def of_floor(row: Row) -> float | None:
    """The read floor's time over ours."""
    own, floor = microseconds(row), row.get("floor_us")
    return floor / own if own and floor else None


def geometric_mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def failures(rows: list[Row]) -> list[str]:
    """Problems on which our own call failed or was wrong."""
    found = []
    for row in rows:
        own = row.get("results", {}).get("flashtile", {})
        for how in ("failed", "wrong", "refused"):
            if why := (own.get(how) or (row.get(how) if how == "failed" else None)):
                found.append(f"{row['name']}: {how}, {why}")
    return found


def _seqlen1(rows: list[Row]) -> Verdict | None:
    ratios = {row["name"]: value for row in rows if (value := ratio(row))}
    if not ratios:
        return None
    mean, worst = geometric_mean(list(ratios.values())), min(ratios, key=lambda name: ratios[name])
    misses = [f"{name}: {value:.2f}x" for name, value in ratios.items() if value < SEQLEN1_EACH]
    if mean < SEQLEN1_MEAN:
        misses.insert(0, f"geometric mean {mean:.3f}x, target {SEQLEN1_MEAN:.2f}x")
    lowest = f"lowest {ratios[worst]:.2f}x at {worst}"
    return Verdict(f"{mean:.3f}x the best peer (geometric mean of {len(ratios)} problems); {lowest}", tuple(misses))


def _speculative(rows: list[Row]) -> Verdict | None:
    misses, seen = [], []
    for row in rows:
        for label, value, least in (("FA3", ratio(row, ("fa3",)), SPECULATIVE_FA3), ("the best peer", ratio(row), SPECULATIVE_BEST)):
            if value:
                seen += [value] if label == "FA3" else []
                misses += [f"{row['name']}: {value:.2f}x {label}, target {least:.2f}x"] if value < least else []
    return Verdict(f"{geometric_mean(seen):.2f}x FA3 (geometric mean), lowest {min(seen):.2f}x", tuple(misses)) if seen else None


def _beside(rows: list[Row], least_of: dict[int, float] | float, what: str) -> Verdict | None:
    ratios = {row["name"]: (row["page_size"], value) for row in rows if (value := beside_ratio(row))}
    if not ratios:
        return None
    least = lambda page: least_of.get(page, 0.0) if isinstance(least_of, dict) else least_of  # noqa: E731
    misses = [f"{name}: {value:.2f}, target {least(page):.2f}" for name, (page, value) in ratios.items() if value < least(page)]
    return Verdict(", ".join(f"{name} {value:.2f}" for name, (_, value) in ratios.items()) + f" of {what}", tuple(misses))


def _floor(rows: list[Row]) -> Verdict | None:
    shares = {row["name"]: value for row in rows if row.get("kv_bytes", 0) >= FLOOR_BYTES and (value := of_floor(row))}
    if not shares:
        return None
    misses = [f"{name}: {value:.1%}" for name, value in shares.items() if value < FLOOR]
    return Verdict(f"{min(shares.values()):.1%} to {max(shares.values()):.1%} of the best sustained read", tuple(misses))


def _search(rows: list[Row]) -> Verdict | None:
    regrets = {row["name"]: row["regret"] for row in rows if "regret" in row}
    if not regrets:
        return None
    share = sum(value <= REGRET_MOST for value in regrets.values()) / len(regrets)
    misses = [f"{name}: {value:.1%} behind" for name, value in regrets.items() if value > REGRET_ALL]
    if share < REGRET_SHARE:
        misses.insert(0, f"within {REGRET_MOST:.0%} on {share:.0%} of problems, target {REGRET_SHARE:.0%}")
    worst = f"worst {max(regrets.values()):.1%}"
    return Verdict(f"within {REGRET_MOST:.0%} of the best found on {share:.0%} of {len(regrets)} problems, {worst}", tuple(misses))


def _host(rows: list[Row]) -> Verdict | None:
    row = next((row for row in rows if row["name"] == HOST_ENTRY and microseconds(row)), None)
    if row is None:
        return None
    gpu, host = row["results"]["flashtile"]["gpu_us"], row["results"]["flashtile"].get("host_us")
    misses = [f"GPU {gpu:.2f} us, target {HOST_GPU_US}"] if gpu > HOST_GPU_US else []
    misses += [f"host {host:.1f} us, target {HOST_US}"] if host and host > HOST_US else []
    return Verdict(f"{HOST_ENTRY}: GPU {gpu:.2f} us, host {host or float('nan'):.1f} us", tuple(misses))


def _cpu(rows: list[Row]) -> Verdict | None:
    ratios = {row["name"]: value for row in rows if (value := ratio(row, ("sdpa",)))}
    if not ratios:
        return None
    misses = [f"{row['name']}: {ratios[row['name']]:.2f}x" for row in rows
              if row["name"] in ratios and ratios[row["name"]] < CPU_EACH and (microseconds(row, "sdpa") or 0) >= CPU_LEAST_US]  # fmt: skip
    if ratios.get(CPU_ENTRY, CPU_RATIO) < CPU_RATIO:
        misses.insert(0, f"{CPU_ENTRY}: {ratios[CPU_ENTRY]:.1f}x, target {CPU_RATIO:.0f}x")
    return Verdict(f"{min(ratios.values()):.2f}x to {max(ratios.values()):.1f}x torch SDPA", tuple(misses))


def verdict(grid: str, rows: list[Row]) -> Verdict | None:
    """What a grid's rows say about its target; None where nothing was timed."""
    judges = {
        "seqlen1": _seqlen1, "speculative": _speculative, "floor": _floor, "search": _search, "sweep": _search, "host": _host, "cpu": _cpu,
        "paged": lambda rows: _beside(rows, PAGED, "the contiguous cache's speed"),
        "ragged": lambda rows: _beside(rows, RAGGED, "the speed of an even batch of the same bytes"),
    }  # fmt: skip
    return judges[grid](rows)
