"""PagedKV against caches without pages: what sequences hold, and what attention makes of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashtile import ArgumentError, DtypeError, OutOfPagesError, PagedKV, ShapeError, attention, attention_varlen, decode

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, DIM, PAGE = 2, 16, 4


def make(num_pages: int = 16, **more: Any) -> PagedKV:
    cache = PagedKV(num_pages, PAGE, HEADS, DIM, dtype=torch.float32, device="cpu", **more)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, HEADS, DIM)


def held(cache: PagedKV, sequence: int, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys, heads, dim) of a sequence, by its page table."""
    step = cache.extend([sequence], 0)
    count, pages = int(step.seqlens_k[0]), step.page_table[0]
    slots = [int(pages[i // PAGE]) * PAGE + i % PAGE for i in range(count)]
    return cache.k[layer].flatten(0, 1)[slots], cache.v[layer].flatten(0, 1)[slots]


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_calls_leaves_what_a_cache_without_pages_holds(seed: int) -> None:
    """Sequences begin, grow, fork, shrink and end at random, until pages run out now and then."""
    draw, cache = random.Random(seed), make()
    torch.manual_seed(seed)
    model: dict[int, torch.Tensor] = {}  # (keys, heads, dim); a value is its key plus one
    refused = 0
    for _ in range(120):
        some = draw.sample(sorted(model), min(len(model), 3))
        match draw.choice(["allocate", "fork", "trim", "free", "append", "append", "append"]):
            case "allocate":
                model[cache.allocate()] = tokens(0)
            case "fork" if some:
                count = draw.randint(0, len(model[some[0]]))
                model[cache.fork(some[0], count)] = model[some[0]][:count]
            case "trim" if some:
                count = draw.randint(0, len(model[some[0]]))
                cache.trim(some[0], count)
                model[some[0]] = model[some[0]][:count]
            case "free" if len(model) > 4:
                cache.free(*some[:2])
                for sequence in some[:2]:
                    del model[sequence]
            case "append" if some:
                counts = [draw.randint(0, 7) for _ in some]
                k = tokens(sum(counts))
                free = cache.num_free_pages
                try:
                    cache.append(some, k, k + 1, counts)
                except OutOfPagesError:
                    refused += 1
                    assert cache.num_free_pages == free
                else:
                    for sequence, new in zip(some, k.split(counts)):
                        model[sequence] = torch.cat([model[sequence], new])
        for sequence, k in model.items():
            assert cache.num_keys(sequence) == len(k)
            got_k, got_v = held(cache, sequence)
            assert torch.equal(got_k, k) and torch.equal(got_v, k + 1)
    assert refused, "pages never ran out: the test is too easy"
    cache.free(*model)
    assert cache.num_free_pages == 16


def test_attention_reads_it_as_a_cache_without_pages() -> None:
    """Prompts of unlike lengths by attention_varlen, in two chunks; then steps by decode, one of them forked."""
    cache = make(num_layers=2)
    k, v, q = tokens(20), tokens(20), torch.randn(20, 4, DIM)
    first, second = cache.allocate(), cache.allocate()
    out = []
    for chunk in ((6, 3), (7, 4)):
        start = 0 if chunk == (6, 3) else 9
        part = slice(start, start + sum(chunk))
        step = cache.extend([first, second], chunk)
        cache.write(step, k[part], v[part], layer=1)
        out.append(
            attention_varlen(
                q[part], cache.k[1], cache.v[1], step.cu_seqlens_new, None, max(chunk), step.max_seqlen_k, page_table=step.page_table,
                seqused_k=step.seqlens_k, causal=True,
            )
        )  # fmt: skip
    rows = {first: [*range(6), *range(9, 16)], second: [*range(6, 9), *range(16, 20)]}
    got = torch.cat(out)
    for own in rows.values():
        torch.testing.assert_close(got[own], attention(q[None, own], k[None, own], v[None, own], causal=True)[0], atol=1e-5, rtol=1e-5)

    fork = cache.fork(first)
    sequences = [first, second, fork]
    new_k, new_v, new_q = tokens(3, 1), tokens(3, 1), torch.randn(3, 1, 4, DIM)
    step = cache.extend(sequences, 1)
    cache.write(step, new_k, new_v, layer=1)
    got = decode(new_q, cache.k[1], cache.v[1], step.seqlens_k, page_table=step.page_table, max_seqlen_k=step.max_seqlen_k)
    for i, own in enumerate((rows[first], rows[second], rows[first])):
        keys, values = (torch.cat([x[own], new[i]])[None] for x, new in ((k, new_k), (v, new_v)))
        torch.testing.assert_close(got[i : i + 1], attention(new_q[i : i + 1], keys, values), atol=1e-5, rtol=1e-5)
    assert cache.k[0].isnan().all(), "the other layer was written to"


def test_a_fork_shares_pages_until_one_of_the_two_writes() -> None:
    cache = make()
    first = cache.allocate()
    cache.append([first], tokens(1, 10), tokens(1, 10))
    assert cache.num_free_pages == 13
    forks = [cache.fork(first) for _ in range(3)]
    assert cache.num_free_pages == 13
    cache.append([first, *forks], tokens(4, 1), tokens(4, 1))
    assert cache.num_free_pages == 10, "three copies of the last page: one of the four keeps it"
    pages = cache.extend([first, *forks], 0).page_table
    assert (pages[:, :2] == pages[0, :2]).all() and len(set(pages[:, 2].tolist())) == 4 and (pages[:, 3:] == -1).all()
    cache.free(first, *forks[:2])
    assert cache.num_free_pages == 13


def test_out_of_pages_changes_nothing() -> None:
    cache = make(num_pages=4)
    first, second = cache.allocate(), cache.allocate()
    cache.append([first], tokens(1, 6), tokens(1, 6))
    before = held(cache, first), cache.k.clone()
    with pytest.raises(OutOfPagesError, match="2 free pages, got a need of 3"):
        cache.append([first, second], tokens(10), tokens(10), [3, 7])
    fork = cache.fork(first)
    with pytest.raises(OutOfPagesError):
        cache.extend([fork, second], [1, 8])
    assert [cache.num_keys(sequence) for sequence in (first, second, fork)] == [6, 0, 6]
    assert all(torch.equal(*pair) for pair in zip(held(cache, first), before[0]))
    torch.testing.assert_close(cache.k, before[1], atol=0.0, rtol=0.0, equal_nan=True)
    cache.free(fork)
    cache.append([first, second], tokens(9), tokens(9), [2, 7])
    assert cache.num_free_pages == 0


def test_wrong_calls_change_nothing() -> None:
    cache = make()
    one = cache.allocate()
    cache.append([one], tokens(1, 3), tokens(1, 3))
    with pytest.raises(ShapeError, match="new tokens"):
        cache.append([one], tokens(4), tokens(4), [3])
    with pytest.raises(ShapeError):
        cache.append([one], torch.randn(1, 2, HEADS + 1, DIM), tokens(1, 2))
    with pytest.raises(ArgumentError, match="comes once"):
        cache.extend([one, one], 1)
    with pytest.raises(ArgumentError, match="comes once"):
        cache.extend([one], -1)
    with pytest.raises(ArgumentError, match="not freed"):
        cache.extend([one, 99], 1)
    for call in (cache.fork, cache.trim):
        with pytest.raises(ArgumentError, match="0 to 3"):
            call(one, 4)
    with pytest.raises(ArgumentError, match="page_size"):
        PagedKV(1, 0, 1, 8, device="cpu")
    assert cache.num_keys(one) == 3 and cache.num_free_pages == 15
    cache.free(one)
    with pytest.raises(ArgumentError, match="not freed"):
        cache.free(one)


def test_the_device_is_never_read() -> None:
    class Unread(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    cache = make()
    first = cache.allocate()
    with Unread():
        cache.extend([first], 9)
        cache.extend([first, cache.fork(first)], 1)
        cache.trim(first, 5)
        cache.free(first)


def test_tables_keep_their_shape_while_sequences_grow() -> None:
    cache = make(num_pages=40)
    sequence = cache.allocate()
    widths = {cache.extend([sequence], 1).page_table.shape for _ in range(64)}
    assert widths == {(1, 8), (1, 16)}


@pytest.mark.parametrize(
    ("name", "count"), [("num_pages", "4"), ("page_size", 1.5), ("num_heads_kv", 0), ("head_dim", -1), ("head_dim_v", 0)]
)
def test_a_cache_of_nothing_is_refused(name: str, count: Any) -> None:
    sizes: dict[str, Any] = {"num_pages": 4, "page_size": 4, "num_heads_kv": 2, "head_dim": 16}
    with pytest.raises(ArgumentError, match=f"{name}: expected an int of at least 1, got"):
        PagedKV(**sizes | {name: count}, device="cpu")


@pytest.mark.parametrize("count", [1.5, "1", None])
def test_counts_of_new_tokens_are_ints(count: Any) -> None:
    cache = PagedKV(4, 4, 2, 16, device="cpu")
    sequence = cache.allocate()
    with pytest.raises(ArgumentError, match="num_new"):
        cache.extend([sequence], [count])
    assert cache.num_free_pages == 4


def test_a_wrong_dtype_and_device_are_named() -> None:
    with pytest.raises(DtypeError, match="dtype: expected a dtype of torch's, got 'bf16'"):
        PagedKV(4, 4, 2, 16, dtype="bf16", device="cpu")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"device: expected .* got 'nowhere'"):
        PagedKV(4, 4, 2, 16, device="nowhere")
