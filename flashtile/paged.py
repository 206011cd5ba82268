"""PagedKV: keys and values in pages, and whose they are.

    cache = PagedKV(num_pages=4096, page_size=64, num_layers=32, num_heads_kv=8, head_dim=128, device="cuda")
    prompt = cache.allocate()
    step = cache.extend([prompt], 100)            # once for each forward pass: pages for 100 new tokens
    for layer in range(32):
        cache.write(step, k, v, layer=layer)      # (1, 100, 8, 128) each
        attention_varlen(q, cache.k[layer], cache.v[layer], step.cu_seqlens_new, None, 100, step.max_seqlen_k, page_table=step.page_table,
                         seqused_k=step.seqlens_k, causal=True)
    answers = [prompt, cache.fork(prompt)]        # two answers to one prompt, which they share
    step = cache.extend(answers, 1)               # and so on, by `decode`

The attention functions know nothing of it: they take ``cache.k``, ``cache.v`` and a step's tensors. Which pages are free and how long
sequences are is kept in Python, so that the device is never read and nothing waits for it. A cache is for one thread at a time, and work
on it goes to the current stream of its device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from flashtile.api import append_kv
from flashtile.arguments import is_int
from flashtile.errors import ArgumentError, DtypeError, OutOfPagesError, ShapeError, message
from flashtile.planner.device import Device

TABLE_STEP = 8  # page tables are this many pages wide, or twice, or so on: their shape rarely changes


@dataclass(frozen=True)
class Step:
    """Sequences with their new tokens, as `decode` and `attention_varlen` want them. What belongs to no page is -1 in the table.

    ``seqlens_k`` counts the new tokens, ``seqlens_before`` does not; both (batch,) int32 on the cache's device.
    """

    page_table: torch.Tensor  # (batch, max_pages) int32
    seqlens_k: torch.Tensor
    seqlens_before: torch.Tensor
    cu_seqlens_new: torch.Tensor  # (batch + 1,) int32: where each sequence's new tokens start, if they are packed
    num_new: tuple[int, ...]
    max_seqlen_k: int


@dataclass
class _Owned:
    """The pages of a sequence in order, and its keys: as many pages as they fill, the last one in part."""

    pages: list[int] = field(default_factory=list)
    num_keys: int = 0


class PagedKV:
    """Pages of keys and values for the layers of a model, which share one page table.

    Attributes:
        k: (num_layers, num_pages, page_size, num_heads_kv, head_dim); ``k[layer]`` is what attention takes.
        v: the same with a last dimension of its own.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_heads_kv: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        num_layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
    ) -> None:
        counts = {
            "num_pages": num_pages, "page_size": page_size, "num_heads_kv": num_heads_kv, "head_dim": head_dim,
            "head_dim_v": head_dim if head_dim_v is None else head_dim_v, "num_layers": num_layers,
        }  # fmt: skip
        for name, count in counts.items():
            if not is_int(count) or count < 1:
                raise ArgumentError(message(name, "an int of at least 1", repr(count), "A cache holds something."))
        if not isinstance(dtype, torch.dtype):
            raise DtypeError(message("dtype", "a dtype of torch's", repr(dtype), "torch.bfloat16, for one."))
        shape = (num_layers, num_pages, page_size, num_heads_kv)
        Device.of(device)  # or an error that names it
        self.k = torch.empty((*shape, head_dim), dtype=dtype, device=device)
        self.v = torch.empty((*shape, head_dim if head_dim_v is None else head_dim_v), dtype=dtype, device=device)
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_owners = [0] * num_pages
        self._sequences: dict[int, _Owned] = {}
        self._next_id = 0

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def num_keys(self, sequence: int) -> int:
        return self._owned(sequence).num_keys

    def allocate(self) -> int:
        """A new sequence without keys, by a number that no other has had. It takes pages as it grows."""
        self._next_id += 1
        self._sequences[self._next_id] = _Owned()
        return self._next_id

    def fork(self, sequence: int, num_keys: int | None = None) -> int:
        """A new sequence that begins with the first ``num_keys`` keys of another, by default all of them.

        It shares their pages. Whichever of the two is first to write to a last page that is not full gets a copy of it.
        """
        owned = self._owned(sequence)
        num_keys = owned.num_keys if num_keys is None else num_keys
        if not 0 <= num_keys <= owned.num_keys:
            raise ArgumentError(message("num_keys", f"0 to {owned.num_keys}, what the sequence has", num_keys, "Fork at a key it has."))
        pages = owned.pages[: self._pages_for(num_keys)]
        for page in pages:
            self._num_owners[page] += 1
        new = self.allocate()
        self._sequences[new] = _Owned(pages, num_keys)
        return new

    def free(self, *sequences: int) -> None:
        """Ends sequences. Pages that they share with none come back."""
        for sequence in sequences:
            self.trim(sequence, 0)
            del self._sequences[sequence]

    def trim(self, sequence: int, num_keys: int) -> None:
        """Takes a sequence back to its first ``num_keys`` keys: of drafted tokens, say, that were refused."""
        owned = self._owned(sequence)
        if not 0 <= num_keys <= owned.num_keys:
            raise ArgumentError(message("num_keys", f"0 to {owned.num_keys}, what the sequence has", num_keys, "To add keys, use extend."))
        kept = self._pages_for(num_keys)
        for page in reversed(owned.pages[kept:]):
            self._release(page)
        owned.pages, owned.num_keys = owned.pages[:kept], num_keys

    def extend(self, sequences: Sequence[int], num_new: int | Sequence[int]) -> Step:
        """Makes room for new tokens of sequences, ``num_new`` of each, or of all if it is one number; 0 is valid.

        The new keys hold anything until they are written.

        Raises:
            OutOfPagesError: too few pages are free. Nothing has changed.
            ArgumentError: an unknown sequence, one that comes twice, or a negative count.
        """
        counts = [num_new] * len(sequences) if isinstance(num_new, int) else list(num_new)
        once = len(counts) == len(set(sequences)) == len(sequences)
        if not once or not all(is_int(count) and count >= 0 for count in counts):
            expected = "a count of 0 or more for each sequence, which comes once"
            raise ArgumentError(message("num_new", expected, f"{counts} for {list(sequences)}", "Merge the counts of one sequence."))
        owned = [self._owned(sequence) for sequence in sequences]
        shared = self._to_copy(owned, counts)
        fresh = [self._pages_for(one.num_keys + count) - len(one.pages) for one, count in zip(owned, counts)]
        if sum(fresh) + sum(shared) > len(self._free):
            raise OutOfPagesError(
                message("num_new", f"what fits {len(self._free)} free pages", f"a need of {sum(fresh) + sum(shared)}", "Free sequences.")
            )
        for one, count, pages, copy in zip(owned, counts, fresh, shared):
            if copy:
                one.pages[-1] = self._copy_of(one.pages[-1])
            one.pages = one.pages + [self._take() for _ in range(pages)]
            one.num_keys += count
        return self._step(owned, counts)

    def write(self, step: Step, k: torch.Tensor, v: torch.Tensor, *, layer: int = 0) -> None:
        """Writes the keys and values of a step's new tokens, of one layer, in one launch.

        Args:
            k, v: (batch, new, num_heads_kv, ...) where all sequences have as many new tokens, or packed (total_new, num_heads_kv, ...).
        """
        starts = step.cu_seqlens_new if k.ndim == 3 else None
        expected = (sum(step.num_new),) if k.ndim == 3 else (len(step.num_new), max(step.num_new, default=0))
        if tuple(k.shape[:-2]) != expected or (starts is None and len(set(step.num_new)) > 1):
            fix = f"The step has {step.num_new} new tokens: pack those of unlike sequences."
            raise ShapeError(message("k", f"{sum(step.num_new)} new tokens, packed or (batch, new)", f"shape {tuple(k.shape)}", fix))
        append_kv(self.k[layer], self.v[layer], k, v, step.seqlens_before, page_table=step.page_table, cu_seqlens_k_new=starts)

    def append(self, sequences: Sequence[int], k: torch.Tensor, v: torch.Tensor, num_new: Sequence[int] | None = None) -> Step:
        """`extend` and `write` in one, for a cache of one layer. Where either raises, nothing has changed.

        Args:
            k, v: (batch, new, num_heads_kv, ...), or with ``num_new``, the counts of new tokens, packed (total_new, num_heads_kv, ...).
        """
        before = [self.num_keys(sequence) for sequence in sequences]
        step = self.extend(sequences, k.shape[1] if num_new is None else num_new)
        try:
            self.write(step, k, v)
        except Exception:
            for sequence, num_keys in zip(sequences, before):
                self.trim(sequence, num_keys)
            raise
        return step

    def _owned(self, sequence: int) -> _Owned:
        if sequence not in self._sequences:
            raise ArgumentError(message("sequence", "one that was allocated and not freed", sequence, "Keep what allocate returned."))
        return self._sequences[sequence]

    def _pages_for(self, num_keys: int) -> int:
        return -(-num_keys // self.page_size)

    def _to_copy(self, owned: list[_Owned], counts: list[int]) -> list[bool]:
        """Whose last page is written to while others have it, too. Of those that share one in a call, the last may keep it."""
        left: Counter[int] = Counter()
        copies = []
        for one, count in zip(owned, counts):
            page = one.pages[-1] if count and one.num_keys % self.page_size else -1
            copies.append(page >= 0 and self._num_owners[page] - left[page] > 1)
            left[page] += copies[-1]
        return copies

    def _take(self) -> int:
        page = self._free.pop()
        self._num_owners[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._num_owners[page] -= 1
        if not self._num_owners[page]:
            self._free.append(page)

    def _copy_of(self, page: int) -> int:
        new = self._take()
        self.k[:, new].copy_(self.k[:, page])
        self.v[:, new].copy_(self.v[:, page])
        self._release(page)
        return new

    def _step(self, owned: list[_Owned], counts: list[int]) -> Step:
        """One copy to the device, from memory that the host does not wait for."""
        batch = len(owned)
        widest = max((len(one.pages) for one in owned), default=0)
        width = max(1, -(-widest // TABLE_STEP)) * TABLE_STEP
        lengths = [one.num_keys for one in owned]
        numbers = [0, *accumulate(counts), *lengths, *(length - count for length, count in zip(lengths, counts))]
        for one in owned:
            numbers += one.pages + [-1] * (width - len(one.pages))
        host = torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=self.k.is_cuda)
        sizes = [batch + 1, batch, batch, batch * width]
        starts, after, before, table = host.to(self.k.device, non_blocking=True).split(sizes)  # type: ignore[no-untyped-call]
        return Step(table.view(batch, width), after, before, starts, tuple(counts), max(lengths, default=0))
