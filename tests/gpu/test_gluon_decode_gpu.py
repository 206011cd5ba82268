"""The Hopper kernel: every small case that it takes, over query tiles, shapes and ways to share out the keys.

Kinds of case take turns at the shapes and at unsplit, split and shared keys, so that each kind meets the query tiles 8,
16 and 64 (every third 128), every shape meets every way, and about 120 kernels are compiled for the small cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashtile
from flashtile import DecodePlan, Problem, UnsupportedError, reference
from flashtile.kernels import launch
from flashtile.planner.catalog import kernel_named
from flashtile.planner.device import Device
from flashtile.testing.cases import SMALL_CASES, Case
from flashtile.testing.inputs import Inputs, hide_unseen, make_inputs
from flashtile.testing.tolerance import assert_close
from flashtile.testing.variants import HOPPER, HOPPER_SHAPES, ONE, PROGRAMS, SHARES, SPLITS, Shape, Share, explicit_plan

if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of sm_90", allow_module_level=True)

NAN = float("nan")
ODD_LENGTHS = (1, 5, 17, 63, 64, 65, 511, 1000, 4097)
EIGHT, SIXTEEN, TALL = Shape(8, 64, 4, 3), Shape(16, 64, 4, 3), Shape(64, 64, 4, 3)
WIDE = Case("wide", (700, 33, 1500, 64), 1, 32, 8, head_dim=128, dtype="bfloat16")
PAGED = replace(WIDE, name="paged", page_size=16, capacity=2048)
EVERY = {8: 1, 16: 1, 64: 1, 128: 3}  # which kinds of case meet a query tile
LEAST_TAKEN = 50  # of the small cases, in a 16-bit dtype


def in_16_bits(case: Case) -> Case:
    return replace(case, dtype="bfloat16") if case.dtype == "float32" else case


def kind(case: Case) -> Any:
    """Equal for cases that share kernels, or nearly."""
    heads = (case.num_heads_q // case.num_heads_kv, case.head_dim, case.head_dim_v, case.dtype, case.page_size, case.layout)
    sides = (case.causal, case.window is not None and case.window[0] is None, case.window is not None and case.window[1] is None)
    return (*heads, *sides, case.softcap > 0, case.alibi, case.sinks, case.ragged_q, case.offset_elements)


def trials() -> Iterator[Any]:
    kinds: dict[Any, int] = {}
    for case in map(in_16_bits, SMALL_CASES):
        turn = kinds.setdefault(kind(case), len(kinds))
        for pick, shapes in enumerate(HOPPER_SHAPES.values()):
            shape, shares = shapes[(turn + pick) % len(shapes)], SHARES[(turn + 2 * pick) % len(SHARES)]
            if turn % EVERY[shape.block_m] == 0:
                yield pytest.param(case, shape, shares, id=f"{case.name}-{shape}-{'-'.join(map(str, shares))}")


def reasons_against(case: Case, device: torch.device) -> list[str]:
    problem = Problem.decode(**make_inputs(case, device).args, lse=True)
    return kernel_named(HOPPER).reasons_against(problem, Device.of(device))


def may_be_refused(case: Case, shape: Shape) -> bool:
    """Where shared memory or registers do not hold the shape; up to 64 rows of 64 keys of up to 128 dims fit four warps.

    But for softcap and ALiBi at once, each of which wants registers for every score of 64 rows.
    """
    much = max(case.head_dim, case.head_dim_v) > 128 or shape.block_m == 128 or shape.block_n == 128 or shape.num_warps < 4
    return much or (shape.block_m == 64 and case.softcap > 0.0 and case.alibi)


def of_shape(shape: Shape) -> Callable[[Problem, Device, Share], DecodePlan]:
    return lambda problem, device, share: explicit_plan(problem, device, HOPPER, shape, share)


def plan_of(inputs: Inputs, shape: Shape, share: Share = ONE, lse: bool = True) -> DecodePlan:
    problem = Problem.decode(**inputs.args, lse=lse)
    return explicit_plan(problem, Device.of(inputs.args["q"]), HOPPER, shape, share)


def close_to_reference(out: torch.Tensor, lse: torch.Tensor | None, args: dict[str, Any], what: str) -> None:
    assert_close(out, lse, *reference.decode(**args, dtype=torch.float32), what=what)


def test_it_takes_nearly_all_small_cases(device: torch.device) -> None:
    against = {case.name: reasons_against(case, device) for case in map(in_16_bits, SMALL_CASES)}
    taken = [name for name, reasons in against.items() if not reasons]
    assert len(taken) >= LEAST_TAKEN, {name: reasons for name, reasons in against.items() if reasons}


@pytest.mark.parametrize(("case", "shape", "shares"), list(trials()))
def test_every_case_matches_the_reference(
    case: Case, shape: Shape, shares: tuple[Share, ...], device: torch.device, check_plans: Callable[..., None]
) -> None:
    if reasons := reasons_against(case, device):
        pytest.skip("; ".join(reasons))
    try:
        check_plans(case, of_shape(shape), shares, seed=3)
    except UnsupportedError as error:
        if not may_be_refused(case, shape):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("dims", [(96, 96), (192, 192), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("block_m", [8, 64])
def test_head_dims(dims: tuple[int, int], block_m: int, check_plans: Callable[..., None]) -> None:
    case = Case("dims", (300,), 3, 8, 2, head_dim=dims[0], head_dim_v=dims[1], dtype="bfloat16", sinks=True)
    why = ""
    for shape in (Shape(block_m, 64, 4, 2), Shape(block_m, 32, 2 if block_m == 8 else 4, 2)):
        try:
            return check_plans(case, of_shape(shape), (Share(3),))
        except UnsupportedError as error:
            why = str(error)
    if block_m == 64 or min(dims) <= 128:
        pytest.fail(f"the smallest tiles are refused: {why}")
    pytest.skip(why)


@pytest.mark.parametrize(
    ("page_size", "shape"), [(0, EIGHT), (8, EIGHT), (16, EIGHT), (64, EIGHT), (256, EIGHT), (0, TALL), (16, TALL)], ids=str
)
def test_odd_lengths_together_and_alone(page_size: int, shape: Shape, device: torch.device) -> None:
    together = Case("together", ODD_LENGTHS, 2, 32, 8, head_dim=128, dtype="bfloat16", page_size=page_size)
    alone = [replace(together, name=f"{n} keys", seqlens_k=(n,), capacity=n) for n in ODD_LENGTHS]
    for case in [together, *alone]:
        inputs = make_inputs(case, device, seed=len(case.seqlens_k))
        expected = reference.decode(**inputs.args, dtype=torch.float32)
        for share in (*SPLITS, Share(1, 132)):
            out, lse = flashtile.decode_with_lse(**inputs.args, plan=plan_of(inputs, shape, share))
            assert_close(out, lse, *expected, what=f"{case.name} {share}")


@pytest.mark.parametrize("growth", [1.0, -1.0])
@pytest.mark.parametrize("shape", [EIGHT, SIXTEEN, TALL], ids=str)
def test_logits_that_move_the_maximum_at_every_tile(growth: float, shape: Shape, device: torch.device) -> None:
    inputs = make_inputs(replace(WIDE, seqlens_k=(1500, 700), seqlens_q=2), device, seed=2)
    args = inputs.args
    # scores run from -60 to 60 (or back) along the keys
    direction = torch.nn.functional.normalize(torch.randn(128, device=device), dim=0)
    ramp = torch.linspace(-growth, growth, 1500, device=device)[:, None] * direction * 60
    args["q"].copy_(direction * 128**0.5 + 0.1 * args["q"])
    args["k_cache"][:, :1500] += ramp[:, None].to(args["k_cache"].dtype)
    for share in (ONE, Share(7), Share(1, 7)):
        out, lse = flashtile.decode_with_lse(**args, plan=plan_of(inputs, shape, share))
        close_to_reference(out, lse, args, f"growth {growth} {share}")


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("shape", [EIGHT, TALL], ids=str)
def test_scales_of_any_sign(scale: float, shape: Shape, check_plans: Callable[..., None]) -> None:
    for case in (replace(WIDE, scale=scale), replace(WIDE, scale=scale, softcap=9.0)):
        check_plans(case, of_shape(shape), (Share(3),))


def interleaved(cache: torch.Tensor) -> torch.Tensor:
    """Keys and values of a token side by side, the others NaN."""
    both = torch.full((*cache.shape[:2], 2, *cache.shape[2:]), NAN, dtype=cache.dtype, device=cache.device)
    both[:, :, 1] = cache
    return both[:, :, 1]


def within_wider_heads(cache: torch.Tensor) -> torch.Tensor:
    wider = torch.full((*cache.shape[:-1], 3 * cache.shape[-1]), NAN, dtype=cache.dtype, device=cache.device)
    part = wider[..., cache.shape[-1] : 2 * cache.shape[-1]]
    return part.copy_(cache)


def every_second_head(cache: torch.Tensor) -> torch.Tensor:
    more = torch.full((*cache.shape[:2], 2 * cache.shape[2], cache.shape[3]), NAN, dtype=cache.dtype, device=cache.device)
    return more[:, :, ::2].copy_(cache)


def heads_first(cache: torch.Tensor) -> torch.Tensor:
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def rows_of_a_longer_buffer(cache: torch.Tensor) -> torch.Tensor:
    longer = torch.full((cache.shape[0] + 2, cache.shape[1] + 64, *cache.shape[2:]), NAN, dtype=cache.dtype, device=cache.device)
    return longer[1:-1, 32:-32].copy_(cache)


@pytest.mark.parametrize("page_size", [0, 16, 64])
@pytest.mark.parametrize(
    "view", [interleaved, within_wider_heads, every_second_head, heads_first, rows_of_a_longer_buffer], ids=lambda f: f.__name__
)
def test_caches_that_are_views(view: Callable[[torch.Tensor], torch.Tensor], page_size: int, device: torch.device) -> None:
    plain = make_inputs(replace(WIDE, page_size=page_size, seqlens_q=2), device, seed=9)
    expected = reference.decode(**plain.args, dtype=torch.float32)
    for name in ("k_cache", "v_cache"):
        plain.args[name] = view(plain.args[name])
    for shape, share in ((SIXTEEN, Share(3)), (TALL, ONE)):
        out, lse = flashtile.decode_with_lse(**plain.args, plan=plan_of(plain, shape, share))
        assert_close(out, lse, *expected, what=f"{view.__name__} {shape}")


def test_k_and_v_in_unlike_layouts(device: torch.device) -> None:
    inputs = make_inputs(replace(WIDE, seqlens_q=2), device, seed=10)
    expected = reference.decode(**inputs.args, dtype=torch.float32)
    inputs.args["k_cache"] = heads_first(inputs.args["k_cache"])
    inputs.args["v_cache"] = interleaved(inputs.args["v_cache"])
    out, lse = flashtile.decode_with_lse(**inputs.args, plan=plan_of(inputs, SIXTEEN, Share(3)))
    assert_close(out, lse, *expected, what="k in HND order, v interleaved")


def test_a_cache_that_grows_by_a_token_a_step(device: torch.device) -> None:
    k, v = (torch.randn(2, 4096, 2, 128, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(2, 1, 16, 128, dtype=torch.bfloat16, device=device)
    compiled = None
    for length in (*range(500, 530), *ODD_LENGTHS[:-1]):
        args = {"q": q, "k_cache": k[:, :length], "v_cache": v[:, :length]}
        args["seqlens_k"] = torch.tensor([length, max(1, length - 7)], dtype=torch.int32, device=device)
        plan = explicit_plan(Problem.decode(**args, lse=True), Device.of(device), HOPPER, EIGHT, Share(3))
        out, lse = flashtile.decode_with_lse(**args, plan=plan)
        close_to_reference(out, lse, args, f"{length} keys")
        compiled = launch.compilations() if compiled is None else compiled
    assert launch.compilations() - compiled <= 3


def test_a_cache_that_moves_between_calls_is_not_read_at_its_old_place(device: torch.device) -> None:
    """Whatever is kept between calls (a tensor map) is kept for an address: another tensor may lie there by then."""
    for step in range(20):
        case = replace(WIDE, seqlens_k=(200 + 64 * (step % 3), 90), capacity=400 if step % 2 else 512)
        inputs = make_inputs(case, device, seed=step)
        out, lse = flashtile.decode_with_lse(**inputs.args, plan=plan_of(inputs, EIGHT, Share(3)))
        close_to_reference(out, lse, inputs.args, f"step {step}")
        del inputs, out, lse
        if step % 5 == 4:
            torch.cuda.empty_cache()


@pytest.mark.parametrize("page_size", [0, 16])
def test_nothing_beyond_the_length_reaches_a_result(page_size: int, device: torch.device) -> None:
    """The same call with NaN, and with plain numbers, wherever nothing should be read: equal to the bit."""
    case = replace(PAGED, page_size=page_size, window=(300, 0), seqlens_q=4)
    poisoned, plain = hide_unseen(make_inputs(case, device, seed=11)), make_inputs(case, device, seed=11)
    for name in ("k_cache", "v_cache"):
        plain.args[name].nan_to_num_(0.5)
    for shape in (SIXTEEN, TALL):
        for share in (ONE, Share(3), Share(1, 7)):
            plan = plan_of(poisoned, shape, share)
            for one, other in zip(
                flashtile.decode_with_lse(**poisoned.args, plan=plan), flashtile.decode_with_lse(**plain.args, plan=plan)
            ):
                assert torch.equal(one, other), f"{shape} {share}"


@pytest.mark.parametrize("page_size", [0, 1, 16])
@pytest.mark.parametrize("shape", [EIGHT, Shape(8, 128, 4, 2), SIXTEEN, TALL], ids=str)
def test_tiles_that_are_not_needed_do_not_arrive_in_a_result(page_size: int, shape: Shape, device: torch.device) -> None:
    """A lone sequence far shorter than its cache: tiles may be asked for before that is known, and memory is used again."""
    for length in (1, 63, 65, 130, 200):
        case = Case("short", (length,), 1, 32, 8, head_dim=128, dtype="bfloat16", page_size=page_size, capacity=4096)
        inputs = make_inputs(case, device, seed=length)
        expected = reference.decode(**inputs.args, dtype=torch.float32)
        for share in (ONE, Share(2), Share(16)):
            plan = plan_of(inputs, shape, share)
            outs = [flashtile.decode_with_lse(**inputs.args, plan=plan) for _ in range(20)]
            for out, lse in outs:
                assert_close(out, lse, *expected, what=f"{length} keys, {share}")
                assert torch.equal(out, outs[0][0])


@pytest.mark.parametrize("case", [WIDE, PAGED], ids=lambda case: case.name)
@pytest.mark.parametrize("share", [ONE, Share(7), Share(1, 7), Share(1, 132)], ids=str)
def test_twenty_repeats_are_bit_identical(case: Case, share: Share, device: torch.device) -> None:
    inputs = make_inputs(case, device, seed=8)
    for shape in (EIGHT, TALL):
        plan = plan_of(inputs, shape, share)
        first, first_lse = flashtile.decode_with_lse(**inputs.args, plan=plan)
        close_to_reference(first, first_lse, inputs.args, str(shape))
        for _ in range(20):
            out, lse = flashtile.decode_with_lse(**inputs.args, plan=plan)
            assert torch.equal(out, first)
            assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("share", [Share(6), Share(1, 132)], ids=str)
def test_four_streams_at_once(share: Share, device: torch.device) -> None:
    many = [make_inputs(PAGED, device, seed=seed) for seed in range(4)]
    plan = plan_of(many[0], EIGHT, share, lse=False)
    alone = [flashtile.decode(**inputs.args, plan=plan) for inputs in many]
    for inputs, out in zip(many, alone):
        close_to_reference(out, None, inputs.args, "alone")
    streams = [torch.cuda.Stream(device) for _ in many]
    torch.cuda.synchronize()
    for _ in range(10):
        outs = []
        for stream, inputs in zip(streams, many):
            with torch.cuda.stream(stream):
                outs += [flashtile.decode(**inputs.args, plan=plan) for _ in range(3)]
        torch.cuda.synchronize()
        assert all(torch.equal(out, alone[i // 3]) for i, out in enumerate(outs))


@pytest.mark.parametrize("share", [ONE, Share(7), Share(1, 132)], ids=str)
def test_a_graph_replays_with_other_lengths_and_pages(share: Share, device: torch.device) -> None:
    inputs = make_inputs(replace(PAGED, seqlens_k=(2048,) * 4), device, seed=2)
    plan = plan_of(inputs, EIGHT, share)
    flashtile.decode_with_lse(**inputs.args, plan=plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flashtile.decode_with_lse(**inputs.args, plan=plan)
    for seed, lengths in enumerate(((700, 33, 1500, 64), (1, 2048, 0, 17), (2048, 2048, 2048, 2048), (5, 6, 7, 8), (0, 0, 0, 0))):
        other = make_inputs(replace(PAGED, seqlens_k=lengths), device, seed=seed)
        for name in ("q", "seqlens_k", "page_table"):
            inputs.args[name].copy_(other.args[name])
        for name in ("k_cache", "v_cache"):
            inputs.args[name].fill_(NAN)
            inputs.args[name][: len(other.args[name])] = other.args[name]
        out.fill_(NAN)
        lse.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        close_to_reference(out, lse, inputs.args, f"lengths {lengths}")


@pytest.mark.parametrize("share", [ONE, Share(6), Share(1, 132)], ids=str)
def test_one_long_sequence_among_short_ones(share: Share, device: torch.device) -> None:
    lengths = (512,) * 10 + (20_000,) + (512,) * 5
    inputs = make_inputs(Case("ragged", lengths, 1, 16, 2, head_dim=128, dtype="bfloat16", page_size=16), device, seed=12)
    out, lse = flashtile.decode_with_lse(**inputs.args, plan=plan_of(inputs, EIGHT, share))
    close_to_reference(out, lse, inputs.args, str(share))


@pytest.mark.parametrize("num_programs", [share.num_programs for share in PROGRAMS])
def test_chunks_of_a_prefill_share_programs(num_programs: int, check_plans: Callable[..., None]) -> None:
    case = Case("chunks", (700, 90, 300), (64, 1, 33), 8, 2, head_dim=128, dtype="bfloat16", ragged_q=True, page_size=64, spare_rows=3)
    for shape in (TALL, SIXTEEN):
        check_plans(case, of_shape(shape), (Share(1, num_programs),))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("share", [ONE, Share(1, 7)], ids=str)
def test_the_far_end_of_a_cache_beyond_2_31_elements(layout: str, share: Share, device: torch.device) -> None:
    seqlen_k, heads, window = 9_000_000, 3, 300
    shape = (1, heads, seqlen_k, 128) if layout == "HND" else (1, seqlen_k, heads, 128)
    k, v = (torch.full(shape, NAN, dtype=torch.float16, device=device) for _ in range(2))
    k, v = (cache.transpose(1, 2) if layout == "HND" else cache for cache in (k, v))
    assert k.numel() > 2**31
    for cache in (k, v):
        cache[:, -window - 1 :] = torch.randn(1, window + 1, heads, 128, dtype=torch.float16, device=device)
    q = torch.randn(1, 1, 6, 128, dtype=torch.float16, device=device)
    args = {
        "q": q,
        "k_cache": k,
        "v_cache": v,
        "seqlens_k": torch.tensor([seqlen_k], dtype=torch.int32, device=device),
        "window": (window, 0),
    }
    plan = explicit_plan(Problem.decode(**args, lse=True), Device.of(device), HOPPER, EIGHT, share)
    out, lse = flashtile.decode_with_lse(**args, plan=plan)
    assert_close(out, lse, *reference.attention(q, k[:, -window - 1 :], v[:, -window - 1 :]), what=layout)


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_beyond_2_31_elements(page_size: int, device: torch.device) -> None:
    pages, lengths = 2**31 // (page_size * 128) + 1000, (500, 17, 333)
    k, v = (torch.full((pages, page_size, 1, 128), NAN, dtype=torch.bfloat16, device=device) for _ in range(2))
    rows = [-(-n // page_size) for n in lengths]
    ids = pages - 1 - torch.randperm(sum(rows), device=device)
    table = torch.full((3, max(rows) + 2), 2**31 - 1, dtype=torch.int32, device=device)
    for row, part in zip(table, ids.split(rows)):
        row[: len(part)] = part.int()
    for cache in (k, v):
        cache[ids] = torch.randn(len(ids), page_size, 1, 128, dtype=torch.bfloat16, device=device)
    seqlens_k = torch.tensor(lengths, dtype=torch.int32, device=device)
    args = {"q": torch.randn(3, 1, 8, 128, dtype=torch.bfloat16, device=device), "k_cache": k, "v_cache": v, "page_table": table}
    plan = explicit_plan(Problem.decode(**args, seqlens_k=seqlens_k, lse=True), Device.of(device), HOPPER, EIGHT, Share(3))
    out, lse = flashtile.decode_with_lse(**args, seqlens_k=seqlens_k, plan=plan)
    close_to_reference(out, lse, {**args, "seqlens_k": seqlens_k}, "high page ids")
