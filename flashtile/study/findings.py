"""A study's findings for a reader: sentences that carry the numbers they rest on, and everything as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from flashtile.study.analysis import FIXED_BLOCK_M, percentile, roofline, verdicts
from flashtile.study.document import Document


def in_words(document: Document) -> Iterator[str]:
    """What a fixed tile loses, how good the planner and the cost model are, and what was compiled: each where the study has it."""
    some = verdicts(document)
    fixed = [(v.fixed_loss, v) for v in some if v.fixed_loss is not None]
    if fixed:
        worst_loss, worst = max(fixed, key=lambda pair: pair[0])
        as_good = sum(FIXED_BLOCK_M in v.ties() for v in some)
        yield (
            f"A fixed block_m of {FIXED_BLOCK_M} loses {median(loss for loss, _ in fixed):.1%} in the median of {len(fixed)} problems, "
            f"{worst_loss:.1%} at most ({worst.point.name}); on {as_good} the spread does not tell it from the best."
        )
    planner = sorted(v.planner_loss for v in some if v.planner_loss is not None)
    if planner:
        share = f"{_within(planner):.0%} of {len(planner)} problems"
        yield f"The planner's choice is within 3% of the best on {share}, {planner[-1]:.1%} off at most."
    unlike = sorted(v.unlike_loss for v in some if v.unlike_loss is not None)
    if unlike:
        yield (
            f"Of the plans that hold up where a batch's lengths differ, it is within 3% of the best on {_within(unlike):.0%} "
            f"of {len(unlike)} problems, {unlike[-1]:.1%} off at most."
        )
    errors = sorted(abs(row.predicted_us / row.us - 1) for entry in document.entries for row in entry.rows)
    if errors and document.basis == "measured":
        yield (
            f"The cost model is off by {median(errors):.1%} in the median of {len(errors)} plans, "
            f"by {percentile(errors, 90):.1%} at the 90th percentile."
        )
    wrong = [entry.point.name for entry in document.entries for _, why in entry.refused if why.startswith("WRONG")]
    if wrong:
        yield f"WRONG results were found at {', '.join(dict.fromkeys(wrong))}."
    if document.compiled:
        made = [facts for facts in document.compiled if "registers" in facts]
        architectures = {facts["arch"] for facts in made}
        yield (
            f"{len(made)} query tiles were compiled over {len(architectures)} architectures, "
            f"{sum(facts['spilled_bytes'] > 0 for facts in made)} of them spill; {len(document.compiled) - len(made)} have no plan there."
        )


def _within(losses: list[float]) -> float:
    """The share of losses up to 3 %."""
    return sum(loss <= 0.03 for loss in losses) / len(losses)


def summary(document: Document) -> dict[str, Any]:
    """Sentences, a row for each problem, bounds and compile facts."""
    return {
        "sentences": list(in_words(document)),
        "problems": [
            {
                "name": v.point.name,
                "best": v.best._asdict(),
                "us_by_block_m": {str(block_m): row.us for block_m, row in sorted(v.by_block_m.items())},
                "as_good": v.ties(),
                "planner_loss": v.planner_loss,
                "planner_loss_for_unlike_lengths": v.unlike_loss,
                "fixed_64_loss": v.fixed_loss,
            }
            for v in verdicts(document)
        ],
        "bounds": [
            {"name": b.point.name, "memory_us": b.memory_us, "matrix_us": b.matrix_us, "best_us": b.best_us, "bound": b.bound}
            for b in roofline(document)
        ],
        "compiled": list(document.compiled),
    }
