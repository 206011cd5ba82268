"""Launches decode variants for compute-sanitizer and prints how many.

    compute-sanitizer --tool memcheck python -m benchmarks.sanitize
    compute-sanitizer --tool racecheck python -m benchmarks.sanitize --only racecheck

Every call is checked against the reference, so that what the tool watched is known to have run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer

import flashtile
from flashtile import UnsupportedError, reference
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.problem import Problem
from flashtile.testing import poison
from flashtile.testing.cases import SMALL_CASES, Case
from flashtile.testing.inputs import make_inputs
from flashtile.testing.tolerance import assert_close

TILES = ((1, False), (8, True), (16, False), (16, True), (32, False), (64, False))
# few launches, each with shared memory in use: the race checker is slow
RACE_CASES = ("speculative_4", "pages_of_16", "ragged_prefill_paged", "window_both_sides", "everything", "dim_128_group_8")


def trials(cases: list[Case]) -> Iterator[tuple[Case, int, bool, int]]:
    """Each case with two tiles, unsplit and split in three."""
    for turn, case in enumerate(cases):
        for splits in (1, 3):
            yield (case, *TILES[(turn + 2 * splits) % len(TILES)], splits)


def run(case: Case, block_m: int, swapped: bool, num_splits: int) -> int:
    """One checked call; returns how many kernels of ours it launched."""
    args: dict[str, Any] = make_inputs(case, "cuda", seed=1).args
    problem = Problem.decode(**args, lse=True)
    device = Device.of("cuda")
    plan = plan_decode(problem, device, block_m=block_m, num_splits=num_splits)
    plan = plan_decode(problem, device, plan=plan.with_(swapped=swapped, source="explicit"))
    out, _ = poison.outputs(args["q"], case.head_dim_v)
    got, lse = flashtile.decode_with_lse(**args, out=out, plan=plan)
    torch.cuda.synchronize()
    expected = reference.decode(**make_inputs(case, "cpu", seed=1).args)
    assert_close(got.cpu(), lse.cpu(), *expected, dtype=got.dtype, what=case.name)
    if out.numel() == 0 or args["k_cache"].numel() == 0:
        return 0
    return 1 if plan.num_splits == 1 else 2


def main(
    only: Annotated[str, typer.Option(help="racecheck: a few cases with shared memory in use.")] = "",
    limit: Annotated[int, typer.Option(help="At most so many cases.")] = 1000,
) -> None:
    """Runs the trials and prints the counts; exits with 1 if a result was wrong or a launch failed."""
    cases = [case for case in SMALL_CASES if not only or case.name in RACE_CASES]
    # float32 tiles are the slowest to compile
    cases = [replace(case, dtype="bfloat16") if case.dtype == "float32" and only else case for case in cases][:limit]
    launches, refused, wrong = 0, 0, []
    for trial in trials(cases):
        try:
            launches += run(*trial)
        except UnsupportedError:
            refused += 1
        except Exception as error:
            wrong.append(f"{trial[0].name} {trial[1:]}: {type(error).__name__} {error}"[:300])
            if "CUDA" in str(error):
                break
    print(f"sanitize: {launches} launches of {len(cases)} cases, {refused} plans refused, {len(wrong)} failures", flush=True)
    for line in wrong:
        print(line)
    if wrong or not launches:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
