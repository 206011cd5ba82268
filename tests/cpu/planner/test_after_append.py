"""When decode is launched as the dependent of an append: where its programs come in waves, fill their SMs evenly, or are done soon."""

from __future__ import annotations

from typing import Any

import pytest

from flashtile.planner.after_append import append_programs, joins_append
from flashtile.planner.choose import plan_decode
from flashtile.planner.device import Device
from flashtile.problem import Problem

H200 = Device.named("H200")


def joins(batch: int, keys: int, device: Device = H200, programs: int | None = None, **facts: Any) -> bool:
    """Of Llama's heads, by the planner's own plan or one with so many programs."""
    problem = Problem(batch=batch, seqlen_k=keys, num_heads_q=32, num_heads_kv=8, after_append=True, **facts)
    plan = plan_decode(problem, device)
    return joins_append(problem, plan if programs is None else plan.with_(num_programs=programs), device)


@pytest.mark.parametrize(
    ("batch", "keys", "facts", "expected"),
    [
        (1, 4096, {}, True),
        (1, 4096, {"page_size": 16}, True),
        (1, 512, {}, True),
        (8, 2048, {}, True),
        (1, 4096, {"seqlen_q": 4}, True),
        (128, 1024, {}, True),
        (32, 4096, {}, False),
    ],
)
def test_the_faster_launch_of_what_was_measured(batch: int, keys: int, facts: dict[str, Any], expected: bool) -> None:
    assert joins(batch, keys, **facts) == expected


def test_what_may_lose_little_joins() -> None:
    assert joins(32, 256) and not joins(32, 2048)


@pytest.mark.parametrize(("programs", "expected"), [(136, True), (137, False), (256, False), (265, True), (396, True), (397, True)])
def test_unevenness_needs_room_on_some_sms_and_too_little_on_all(programs: int, expected: bool) -> None:
    """An SM holds 3 of these programs, and the append has 128: two on each SM hold up to 136 of decode's beside them."""
    problem = Problem(batch=32, seqlen_k=4096, num_heads_q=32, num_heads_kv=8)
    assert append_programs(problem) == 128
    assert joins(32, 4096, programs=programs) == expected


def test_only_what_can_be_launched_early_joins() -> None:
    assert not joins(1, 4096, Device.named("A100")) and not joins(1, 4096, Device.named("cpu"))


def test_an_append_of_few_programs_fits_beside_one_of_decodes_on_each_sm() -> None:
    """128 programs on 132 SMs leave room for the 4 of one token, not for the 12 of four."""
    assert joins(1, 131072) and not joins(1, 131072, seqlen_q=4)
