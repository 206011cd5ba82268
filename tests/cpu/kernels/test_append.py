"""Appends to a cache: the CPU's operations against their definition, the GPU's kernel in the interpreter against the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashtile
from flashtile import reference
from flashtile.errors import ArgumentError, AttentionError, DtypeError, ShapeError, UnsupportedError
from flashtile.kernels.call import AppendCall
from flashtile.testing.append_cases import AppendCase, assert_written, written
from flashtile.testing.pairwise import pairwise

AXES = {
    "new": (1, 5, (2, 0, 9), (0, 40, 1)),
    "queries": (0, 1, 5, (2, 0, 4)),
    "heads": ((6, 2), (4, 4), (3, 1)),
    "dims": ((32, 16), (59, 59), (8, 64)),
    "pairs": (None, 4, 2),
    "interleaved": (False, True),
    "queries_advance": (False, True),
    "own_positions": (False, True),
    "dtype": ("float16", "float32", "bfloat16"),
    "dtype_table": ("float32", "bfloat16"),
    "page_size": (0, 1, 8, 40),
    "seqlens": ((3, 36, 0), (40, 47, -3)),
}
ROWS = [*pairwise(AXES, seed=8), {"pairs": 16}, {"pairs": 16, "interleaved": True}, {"pairs": 0}, {"page_size": 20, "new": 40}]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_on_a_cpu(row: dict[str, Any]) -> None:
    args = AppendCase(**row).arguments()
    given = {name: args[name].clone() for name in ("q", "k") if name in args}
    expected = written(args)
    assert_written(args, flashtile.append_kv(**args), expected)
    assert all(torch.equal(args[name], value) for name, value in given.items()), "neither k nor q is changed"


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_the_kernel_of_gpus(row: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    from flashtile.kernels import append

    args = AppendCase(**row).arguments()
    expected = written(args)
    assert_written(args, run_by(append, args), expected)


def run_by(module: Any, args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One append by a kernel's module, on whatever device the tensors are."""
    q, cos = args.get("q"), args.get("rotary_cos")
    turned = torch.full_like(q, float("nan")).contiguous() if q is not None and cos is not None else None
    call = AppendCall(
        args["k"], args["v"], args["k_cache"], args["v_cache"], args["seqlens_k"], args.get("page_table"), args.get("cu_seqlens_k_new"),
        None if turned is None else q, args.get("cu_seqlens_q"), cos, args.get("rotary_sin"), args.get("rotary_seqlens"),
        torch.full_like(args["seqlens_k"], -7), turned, args.get("rotary_interleaved", False), args.get("queries_advance", True),
        args.get("k_scale"), args.get("v_scale"),
    )  # fmt: skip
    module.runner_for(call)(call)
    return call.new_seqlens, q if turned is None else turned


def test_starts_that_make_no_sense_write_nothing_outside() -> None:
    pytest.importorskip("triton")
    from flashtile.kernels import append, cpu_append

    results = []
    for module in (append, cpu_append):
        args = AppendCase(new=(2, 0, 9)).arguments()
        args["cu_seqlens_k_new"] = torch.tensor([-5, 4, 2, 900], dtype=torch.int32)
        seqlens, _ = run_by(module, args)
        results.append((seqlens, args["k_cache"].nan_to_num(-1.0), args["v_cache"].nan_to_num(-1.0)))
    for kernels, cpus in zip(*results):
        torch.testing.assert_close(kernels, cpus)
    assert results[0][0].tolist() == [7, 36, 11]


SCALES = {"none": None, "one": (1,), "head": (2,), "sequence": (3, 2)}


def quantised(row: dict[str, Any], stored: torch.dtype, k_scales: str, v_scales: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An append to caches of codes, and the same to caches as wide as what is new; both hold zeros so far."""
    args = AppendCase(**row).arguments()
    args |= {name: torch.zeros_like(args[name], dtype=torch.float64) for name in ("k_cache", "v_cache")}
    codes = args | {name: args[name].to(stored) for name in ("k_cache", "v_cache")}
    rng = torch.Generator().manual_seed(3)
    for name, shape in (("k_scale", SCALES[k_scales]), ("v_scale", SCALES[v_scales])):
        if shape is not None:
            codes[name] = (torch.rand(shape, generator=rng) + 0.1) * 0.04
    return codes, args


@pytest.mark.parametrize("by", ["kernel", "cpu"])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(
    ("row", "k_scales", "v_scales"),
    [({"pairs": None}, "one", "sequence"), ({}, "head", "none"), ({"interleaved": True, "page_size": 8}, "sequence", "head"),
     ({"new": (2, 0, 9), "dtype": "float32"}, "none", "one")],
    ids=range(4),
)  # fmt: skip
def test_caches_of_codes_hold_the_nearest(row: dict[str, Any], k_scales: str, v_scales: str, stored: torch.dtype, by: str) -> None:
    if by == "kernel":
        pytest.importorskip("triton")
        from flashtile.kernels import append as module
    else:
        from flashtile.kernels import cpu_append as module  # type: ignore[no-redef]
    codes, wide = quantised(row, stored, k_scales, v_scales)
    run_by(module, codes)
    expected = written(wide)
    table = wide.get("page_table")
    sequence = torch.arange(3)
    if table is not None:
        sequence = torch.zeros(len(codes["k_cache"]), dtype=torch.long)
        for b, pages in enumerate(table.tolist()):
            sequence[[page for page in pages if page < len(sequence)]] = b
    for name, exact in (("k_scale", expected.k_cache), ("v_scale", expected.v_cache)):
        cache = codes[f"{name[0]}_cache"]
        scale = codes.get(name, torch.ones(1)).double().expand(3, 2)[sequence][:, None, :, None]
        most = 127.0 if stored == torch.int8 else 448.0
        wanted = (exact / scale).clamp(-most - (stored == torch.int8), most)
        step = torch.ones_like(wanted) if stored == torch.int8 else (wanted.abs() / 8).clamp(min=2.0**-9)
        error = (cache.double() - wanted).abs()
        assert (error <= step / 2 * (1 + 1e-5) + 1e-5).all(), f"{name}: off by {(error / step).max()} steps"
        assert not (cache.double() == 0).all()


@pytest.mark.parametrize("x", [0.0, -0.0, 448.0, 464.0, 1e9, -1e30, float("inf"), -float("inf"), float("nan"), 2.0**-9, 2.0**-10, 1.0625])
def test_codes_of_odd_numbers(x: float) -> None:
    pytest.importorskip("triton")
    from flashtile.kernels import append

    args = AppendCase(pairs=None, dtype="float32", new=1).arguments()
    args |= {"k": torch.full_like(args["k"], x), "v": torch.full_like(args["v"], x)}
    args |= {name: torch.zeros_like(args[name]).to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    run_by(append, args)
    expected = torch.tensor(x).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    assert (args["v_cache"].view(torch.uint8)[0, 3] & 0x7F == expected & 0x7F).all()
    assert x != x or (args["v_cache"].view(torch.uint8)[0, 3] == expected).all()


def test_codes_come_as_they_are() -> None:
    args = AppendCase(pairs=None, queries=0).arguments()
    for name in ("k", "v", "k_cache", "v_cache"):
        args[name] = args[name].nan_to_num(0.0).to(torch.float8_e4m3fn)
    flashtile.append_kv(**args)
    assert torch.equal(args["v_cache"][0, 3:8].view(torch.uint8), args["v"][0].view(torch.uint8))
    with pytest.raises(ArgumentError, match="k_scale and v_scale"):
        flashtile.append_kv(**args, k_scale=torch.ones(1))


def test_no_sequence_and_nothing_new() -> None:
    args = AppendCase(seqlens=(), new=1, queries=1).arguments()
    seqlens, q = flashtile.append_kv(**args)
    assert seqlens.shape == (0,) and q is not None and q.shape[0] == 0
    args = AppendCase(new=0, queries=0).arguments()
    assert_written(args, flashtile.append_kv(**args), written(args))


@pytest.mark.parametrize("row", [{}, {"page_size": 8, "new": (2, 0, 9)}, {"queries": 0}, {"pairs": None}], ids=range(4))
def test_compilers_see_one_graph_that_writes_the_caches(row: dict[str, Any]) -> None:
    args = AppendCase(**row).arguments()
    expected = written(args)
    compiled = torch.compile(flashtile.append_kv, fullgraph=True, backend="aot_eager")
    assert_written(args, compiled(**args), expected)


def test_the_operator_is_what_it_says() -> None:
    args = AppendCase(new=2, queries=2).arguments()
    for cache in ("k_cache", "v_cache"):
        args[cache] = torch.zeros_like(args[cache])
    names = (
        "k_cache", "v_cache", "k", "v", "seqlens_k", "page_table", "cu_seqlens_k_new", "q", "cu_seqlens_q", "max_seqlen_q", "rotary_cos",
        "rotary_sin", "rotary_seqlens", "rotary_interleaved", "queries_advance", "k_scale", "v_scale",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.flashtile.append_kv.default, tuple(args.get(name) for name in names))


def test_decode_takes_what_it_returns() -> None:
    args = AppendCase(dtype="float32", dims=(32, 32)).arguments()
    for cache in ("k_cache", "v_cache"):
        args[cache] = torch.randn(args[cache].shape)
    expected = written(args)
    seqlens_k, q = flashtile.append_kv(**args)
    out = flashtile.decode(q, args["k_cache"], args["v_cache"], seqlens_k)
    assert expected.q is not None
    by_hand = reference.decode(expected.q, expected.k_cache, expected.v_cache, expected.seqlens_k, causal=True)[0]
    torch.testing.assert_close(out.double(), by_hand, atol=1e-5, rtol=1e-5)


def test_checked_calls_say_what_is_wrong() -> None:
    with flashtile.checked():
        with pytest.raises(ArgumentError, match=r"seqlens_k\[1\].*40, got 36 and 5"):
            flashtile.append_kv(**AppendCase().arguments())
        with pytest.raises(ArgumentError, match=r"page_table\[2, 4\]"):
            flashtile.append_kv(**AppendCase(seqlens=(3, 3, 33), page_size=8).arguments())
        flashtile.append_kv(**AppendCase(seqlens=(3, 3, 30), page_size=8, new=2).arguments())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k": torch.zeros(3, 5, 2, 16)}, ShapeError, "k:"),
        ({"k": torch.zeros(2, 5, 2, 32, dtype=torch.float16)}, ShapeError, "k:"),
        ({"k": torch.zeros(5, 2, 32, dtype=torch.float16)}, ShapeError, "k:"),
        ({"v": torch.zeros(3, 4, 2, 16, dtype=torch.float16)}, ShapeError, "v:"),
        ({"v": torch.zeros(3, 5, 2, 16)}, DtypeError, "v:"),
        ({"v": None}, DtypeError, "v:"),
        ({"seqlens_k": torch.zeros(3)}, DtypeError, "seqlens_k"),
        ({"seqlens_k": torch.zeros(2, dtype=torch.int32)}, ShapeError, "k_cache"),
        ({"rotary_sin": None}, ArgumentError, "rotary_cos and rotary_sin"),
        ({"rotary_cos": torch.zeros(9, 8)}, ShapeError, "rotary_cos and rotary_sin"),
        ({"rotary_cos": torch.zeros(9, 17), "rotary_sin": torch.zeros(9, 17)}, ShapeError, "rotary_cos"),
        ({"rotary_seqlens": torch.zeros(2, dtype=torch.int32)}, ShapeError, "rotary_seqlens"),
        ({"rotary_cos": None, "rotary_sin": None, "rotary_seqlens": torch.zeros(3, dtype=torch.int32)}, ArgumentError, "rotary_seqlens"),
        ({"rotary_interleaved": 1}, ArgumentError, "rotary_interleaved"),
        ({"queries_advance": None}, ArgumentError, "queries_advance"),
        ({"q": torch.zeros(3, 5, 6, 32)}, DtypeError, "q:"),
        ({"q": torch.zeros(3, 5, 5, 32, dtype=torch.float16)}, ShapeError, "q:"),
        ({"cu_seqlens_k_new": torch.zeros(4, dtype=torch.int32)}, ShapeError, "k:"),
        ({"q": torch.zeros(9, 6, 32).half(), "cu_seqlens_q": torch.zeros(4, dtype=torch.int32)}, ArgumentError, "max_seqlen_q"),
        ({"k_cache": torch.zeros(1, 40, 2, 32, dtype=torch.float16).expand(3, -1, -1, -1)}, ShapeError, "k_cache"),
        ({"page_table": torch.zeros(3, 2)}, DtypeError, "page_table"),
        ({"q": None, "max_seqlen_q": 5}, ArgumentError, "max_seqlen_q: expected None without q"),
        ({"q": None, "cu_seqlens_q": torch.zeros(4, dtype=torch.int32)}, ArgumentError, "cu_seqlens_q: expected None without q"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_wrong_arguments(change: dict[str, Any], error: type[AttentionError], match: str) -> None:
    with pytest.raises(error, match=match):
        flashtile.append_kv(**AppendCase().arguments() | change)


def test_devices_without_a_kernel() -> None:
    with pytest.raises(UnsupportedError, match="meta"):
        flashtile.append_kv(**AppendCase().arguments("meta"))
