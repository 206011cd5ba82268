"""The KV cache as tiles of keys: contiguous, or paged with any page size."""

import triton
import triton.language as tl


@triton.jit
def locate(pages, b, start, n, first, last, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where keys start + n lie: (block, slot, inside).

    ``block`` is the sequence or the page (int64, scalar or one a key), ``slot`` the first key's place in it (scalar or one
    a key), ``inside`` whether each key lies in [first, last) and exists. Ids outside the cache are masked; table entries
    of pages outside [first, last) are not read, so that an engine may have freed them. ``first`` is None where all keys of
    the tile are known to lie there.
    """
    key = start + n
    inside = n >= 0 if first is None else (key >= first) & (key < last)
    if PAGE_SIZE == 0:
        return b.to(tl.int64), tl.full([], 0, tl.int64) + start, inside
    elif PAGE_SIZE % BLOCK_N == 0:
        # start is a multiple of BLOCK_N: the tile lies in one page
        page = tl.load(pages.table + b.to(tl.int64) * pages.stride_b + start // PAGE_SIZE)
        known = (page >= 0) & (page < pages.num_pages)
        return tl.where(known, page, 0).to(tl.int64), tl.full([], 0, tl.int64) + start % PAGE_SIZE, inside & known
    else:
        page = page_of(pages, b, key, inside, PAGE_SIZE)
        known = is_page(pages, page)
        return tl.where(known, page, 0).to(tl.int64), (key.to(tl.uint32) % PAGE_SIZE).to(tl.int32), inside & known


@triton.jit
def page_of(pages, b, key, inside, PAGE_SIZE: tl.constexpr):
    """The table's entry for each key that is ``inside``, else -1."""
    # keys are not negative: unsigned division is a shift where the page size is a power of two
    index = (key.to(tl.uint32) // PAGE_SIZE).to(tl.int32)
    return tl.load(pages.table + b.to(tl.int64) * pages.stride_b + index, mask=inside, other=-1)


@triton.jit
def is_page(pages, page):
    """Whether the cache has a page of that number."""
    return page.to(tl.uint32) < pages.num_pages.to(tl.uint32)


@triton.jit
def load_tile(ptr, view, h, block, slot, inside, n, d, DIM: tl.constexpr, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """[keys, dim] tile at ``ptr`` with the strides of ``view``. ``inside`` is None where every key is known to exist.

    Zeros where a key or a dim does not exist: 0 x NaN of unwritten memory must not reach a sum.
    """
    base = ptr + h.to(tl.int64) * view.stride_h
    if PAGE_SIZE % BLOCK_N == 0:
        ptrs = (base + block * view.stride_b + slot * view.stride_n) + ((n * view.stride_n)[:, None] + d[None, :])
    else:
        ptrs = base + (block * view.stride_b + slot * view.stride_n)[:, None] + d[None, :]
    if inside is None:
        if d.shape[0] == DIM:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(d < DIM)[None, :], other=0.0)
    elif d.shape[0] == DIM:
        return tl.load(ptrs, mask=inside[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
