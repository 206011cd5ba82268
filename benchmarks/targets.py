"""What the figures are held to, and what misses it."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from typing import Any

Row = dict[str, Any]
RIVALS = ("fa2", "fa3", "flashinfer_tc", "flashinfer_cc", "cudnn", "torch_flash")
# what decode on one H200 is held to: bfloat16, head dim 128, cold L2, peers timed in turn in one process, the planner's own choice
SEQLEN1_MEAN, SEQLEN1_EACH = 1.20, 0.98
CUDNN = {"1x512 32/8": 1.80, "1x4096 32/8": 1.38, "8x2048 32/8": 1.12, "1x32768 32/8": 1.06, "32x4096 32/8": 1.00}
SPECULATIVE_FEW = {"1x4096": 1.40, "1x32768": 1.10, "16x4096": 1.02}  # 2 and 4 queries, against FlashAttention-3
SPECULATIVE_MANY = 1.05  # 8 and 16 queries
FLOORS = ((60_000_000, 70_000_000, 0.88), (512_000_000, 10**15, 0.97))  # bytes from, bytes to, share of the read floor
PAGED = {16: 0.95, 64: 0.98, 1: 0.85}
RAGGED = 0.93
QUANTISED, QUANTISED_LEAST = ("32x4096 32/8 e4m3", "1x131072 32/8 e4m3"), 1.75  # times as fast as over a cache of 16 bits
HOST_US = {2: 12.0, 1: 8.0}  # by kernels launched
REGRET_MOST, REGRET_SHARE, REGRET_ALL = 0.03, 0.90, 0.08
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


def sooner_than_beside(row: Row) -> float | None:
    """The time of the problem beside over ours: of a quantised cache, that of the same keys and values in 16 bits."""
    own, other = microseconds(row), microseconds(row, "beside")
    return other / own if own and other else None


def of_floor(row: Row) -> float | None:
    """The read floor's time over ours."""
    own, floor = microseconds(row), row.get("floor_us")
    return floor / own if own and floor else None


def of_cudnn(row: Row) -> float | None:
    """How many times as fast as cuDNN."""
    return ratio(row, ("cudnn",))


def kernels_launched(row: Row) -> int:
    """2 where the plan wants partial results combined, else 1: Hopper's kernel merges what only unlike lengths split itself."""
    plan = row["plan"]
    if plan.get("num_programs", 0) and plan["num_splits"] == 1 and plan.get("kernel") == "gluon.decode_sm90":
        return 1
    return 2 if (plan.get("num_programs", 0) or plan["num_splits"]) > 1 else 1


def host_us(row: Row, name: str = "flashtile") -> float | None:
    value = row.get("results", {}).get(name, {}).get("host_us")
    return float(value) if value else None


def least_of_fa3(row: Row) -> float:
    """The target against FlashAttention-3 of one problem with several queries."""
    return SPECULATIVE_FEW.get(row["name"].split()[0], SPECULATIVE_MANY) if row["seqlen_q"] <= 4 else SPECULATIVE_MANY


def least_of_floor(row: Row) -> float | None:
    """The share of the read floor that a problem of these bytes is held to; None between the sizes that are."""
    return next((share for low, high, share in FLOORS if low <= row.get("kv_bytes", 0) < high), None)


def geometric_mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def outcome(result: dict[str, Any]) -> str:
    """Why a contestant has no time."""
    return next((f"{how}: {result[how]}" for how in ("wrong", "failed", "refused") if how in result), "not timed")


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
    against = {row["name"]: (value, least_of_fa3(row)) for row in rows if (value := ratio(row, ("fa3",)))}
    if not against:
        return None
    values = [value for value, _ in against.values()]
    misses = [f"{name}: {value:.2f}x FA3, target {least:.2f}x" for name, (value, least) in against.items() if value < least]
    return Verdict(f"{geometric_mean(values):.2f}x FA3 (geometric mean), lowest {min(values):.2f}x", tuple(misses))


def _beside(rows: list[Row], least_of: dict[int, float] | float, what: str) -> Verdict | None:
    ratios = {row["name"]: (row["page_size"], value) for row in rows if (value := beside_ratio(row))}
    if not ratios:
        return None
    least = lambda page: least_of.get(page, 0.0) if isinstance(least_of, dict) else least_of  # noqa: E731
    misses = [f"{name}: {value:.2f}, target {least(page):.2f}" for name, (page, value) in ratios.items() if value < least(page)]
    return Verdict(", ".join(f"{name} {value:.2f}" for name, (_, value) in ratios.items()) + f" of {what}", tuple(misses))


def _quantised(rows: list[Row]) -> Verdict | None:
    ratios = {row["name"]: value for row in rows if (value := sooner_than_beside(row))}
    if not ratios:
        return None
    below = [name for name in QUANTISED if name in ratios and ratios[name] < QUANTISED_LEAST]
    misses = [f"{name}: {ratios[name]:.2f}x, target {QUANTISED_LEAST:.2f}x" for name in below]
    held = {name: value for name, value in ratios.items() if name in QUANTISED} or ratios
    return Verdict(", ".join(f"{name} {value:.2f}x" for name, value in held.items()) + " as fast as over bfloat16", tuple(misses))


def _floor(rows: list[Row]) -> Verdict | None:
    shares = {row["name"]: (value, least) for row in rows if (least := least_of_floor(row)) and (value := of_floor(row))}
    if not shares:
        return None
    misses = [f"{name}: {value:.1%}, target {least:.0%}" for name, (value, least) in shares.items() if value < least]
    values = [value for value, _ in shares.values()]
    return Verdict(f"{min(values):.1%} to {max(values):.1%} of the speed of a kernel that merely reads", tuple(misses))


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
    timed = [(row["name"], kernels_launched(row), us) for row in rows if (us := host_us(row))]
    if not timed:
        return None
    words = {1: "one kernel", 2: "two kernels"}
    misses = [f"{name}: {us:.1f} us for {words[count]}, target {HOST_US[count]:.0f}" for name, count, us in timed if us > HOST_US[count]]
    return Verdict("; ".join(f"{name} {us:.1f} us of host time for {words[count]}" for name, count, us in timed), tuple(misses))


def _cpu(rows: list[Row]) -> Verdict | None:
    ratios = {row["name"]: value for row in rows if (value := ratio(row, ("sdpa",)))}
    if not ratios:
        return None
    misses = [f"{row['name']}: {ratios[row['name']]:.2f}x" for row in rows
              if row["name"] in ratios and ratios[row["name"]] < CPU_EACH and (microseconds(row, "sdpa") or 0) >= CPU_LEAST_US]  # fmt: skip
    if ratios.get(CPU_ENTRY, CPU_RATIO) < CPU_RATIO:
        misses.insert(0, f"{CPU_ENTRY}: {ratios[CPU_ENTRY]:.1f}x, target {CPU_RATIO:.0f}x")
    return Verdict(f"{min(ratios.values()):.2f}x to {max(ratios.values()):.1f}x torch SDPA", tuple(misses))


@dataclass(frozen=True)
class Goal:
    """One line of the table of targets: ``met`` is None where it was not measured."""

    what: str
    bar: str
    reached: str
    met: bool | None
    grid: str


def goals(results: dict[str, list[Row]]) -> list[Goal]:
    """What decode is held to on one H200, and what the rows of each grid reach."""
    rows = {grid: results.get(grid, []) for grid in ("seqlen1", "speculative", "floor", "paged", "ragged", "host", "fp8")}
    return [*_seqlen1_goals(rows["seqlen1"]), *_floor_goals(rows["floor"]), *_speculative_goals(rows["speculative"]),
            *_paged_goals(rows["paged"]), *_ragged_goals(rows["ragged"]), *_quantised_goals(rows["fp8"]),
            *_host_goals(rows["host"])]  # fmt: skip


def _goal(what: str, bar: str, grid: str, values: list[float | None], least: float, show: str = "{:.2f}x") -> Goal:
    """Met where the least of the values is; a problem that was not timed is left out."""
    known = [value for value in values if value is not None]
    if not known:
        return Goal(what, bar, "not measured", None, grid)
    low, high = (show.format(end(known)) for end in (min, max))
    return Goal(what, bar, low if low == high else f"{low} to {high}", min(known) >= least, grid)


def _seqlen1_goals(rows: list[Row]) -> list[Goal]:
    ratios = [value for row in rows if (value := ratio(row))]
    bar = f">= {SEQLEN1_MEAN:.2f}x in geometric mean, none below {SEQLEN1_EACH:.2f}x"
    what = "one query, the best peer of each problem"
    if ratios:
        mean = geometric_mean(ratios)
        reached = f"{mean:.3f}x over {len(ratios)}, lowest {min(ratios):.2f}x"
        found = [Goal(what, bar, reached, mean >= SEQLEN1_MEAN and min(ratios) >= SEQLEN1_EACH, "seqlen1")]
    else:
        found = [Goal(what, bar, "not measured", None, "seqlen1")]
    by_name = {row["name"]: row for row in rows}
    for name, least in CUDNN.items():
        found.append(_goal(f"{name}, cuDNN", f">= {least:.2f}x", "seqlen1", [of_cudnn(by_name.get(name, {}))], least))
    return found


def _floor_goals(rows: list[Row]) -> list[Goal]:
    return [
        _goal(f"{words} of keys and values, the read floor", f">= {least:.0%}", "floor",
              [of_floor(row) for row in rows if low <= row.get("kv_bytes", 0) < high], least, "{:.1%}")
        for words, (low, high, least) in zip(("67 MB", "512 MB and more"), FLOORS)
    ]  # fmt: skip


def _speculative_goals(rows: list[Row]) -> list[Goal]:
    fa3 = lambda some: [ratio(row, ("fa3",)) for row in some]  # noqa: E731
    few = [row for row in rows if row["seqlen_q"] <= 4]
    found = [
        _goal(
            f"{shape}, 2 and 4 queries, FA3", f">= {least:.2f}x", "speculative", fa3([r for r in few if r["name"].startswith(shape)]), least
        )
        for shape, least in SPECULATIVE_FEW.items()
    ]
    many = [row for row in rows if row["seqlen_q"] > 4]
    return [*found, _goal("8 and 16 queries, FA3", f">= {SPECULATIVE_MANY:.2f}x", "speculative", fa3(many), SPECULATIVE_MANY)]


def _paged_goals(rows: list[Row]) -> list[Goal]:
    return [
        _goal(f"pages of {page}, the contiguous cache", f">= {least:.2f}x", "paged",
              [beside_ratio(row) for row in rows if row["page_size"] == page], least)
        for page, least in PAGED.items()
    ]  # fmt: skip


def _ragged_goals(rows: list[Row]) -> list[Goal]:
    return [
        _goal(f"ragged batches, {words}, an even batch of the same bytes", f">= {RAGGED:.2f}x", "ragged",
              [beside_ratio(row) for row in rows if bool(row["page_size"]) == paged], RAGGED)
        for words, paged in (("contiguous", False), ("pages of 16", True))
    ]  # fmt: skip


def _quantised_goals(rows: list[Row]) -> list[Goal]:
    held = [sooner_than_beside(row) for row in rows if row["name"] in QUANTISED]
    what = "float8, 32x4096 and 1x131072, the cache in bfloat16"
    return [_goal(what, f">= {QUANTISED_LEAST:.2f}x", "fp8", held, QUANTISED_LEAST)]


def _host_goals(rows: list[Row]) -> list[Goal]:
    found = []
    for count, words in ((2, "two kernels"), (1, "one kernel")):
        times = [us for row in rows if (us := host_us(row)) and kernels_launched(row) == count]
        reached = f"{min(times):.1f} to {max(times):.1f} us" if times else "not measured"
        met = max(times) <= HOST_US[count] if times else None
        found.append(Goal(f"host time of {words}", f"<= {HOST_US[count]:.0f} us", reached, met, "host"))
    return found


def verdict(grid: str, rows: list[Row]) -> Verdict | None:
    """What a grid's rows say about its target; None where nothing was timed."""
    judges = {
        "seqlen1": _seqlen1, "speculative": _speculative, "floor": _floor, "search": _search, "sweep": _search, "host": _host, "cpu": _cpu,
        "fp8": _quantised,
        "paged": lambda rows: _beside(rows, PAGED, "the contiguous cache's speed"),
        "ragged": lambda rows: _beside(rows, RAGGED, "the speed of an even batch of the same bytes"),
    }  # fmt: skip
    return judges[grid](rows)
