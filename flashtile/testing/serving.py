"""A small serving engine over plain tensors: pages, continuous batching, chunked prefill, decode, frees.

It has no model. Keys, values and queries are random numbers; which of them exist at each step, where they lie in the
paged cache and how long each sequence is are what a serving engine would hand to attention.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from flashtile.errors import ArgumentError, message
from flashtile.testing.traffic import Request

StepKind = Literal["decode", "speculative", "prefill", "mixed"]
TABLE_STEP = 8  # page tables grow by this many columns, so that their shape rarely changes


@dataclass(frozen=True)
class Heads:
    """The attention part of a model."""

    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def for_device(cls, device: torch.device) -> Heads:
        """32/8 heads on a GPU; a quarter of them where a CPU does the work. The ratio is the same."""
        heads_q, heads_kv = (8, 2) if device.type == "cpu" else (32, 8)
        return cls(heads_q, heads_kv, 128, torch.bfloat16)

    @property
    def bytes_per_key(self) -> int:
        return 2 * self.num_heads_kv * self.head_dim * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.num_heads_q}/{self.num_heads_kv} heads, head dim {self.head_dim}, {str(self.dtype).removeprefix('torch.')}"


class PagedCache:
    """Keys and values in pages: k and v (num_pages, page_size, num_heads_kv, head_dim), and who may use which page.

    A page that was never written holds NaN: a read outside a sequence shows in the result.
    """

    def __init__(self, heads: Heads, num_pages: int, page_size: int, device: torch.device, generator: torch.Generator) -> None:
        shape = (num_pages, page_size, heads.num_heads_kv, heads.head_dim)
        self.page_size = page_size
        self.num_pages = num_pages
        self.k = torch.full(shape, float("nan"), dtype=heads.dtype, device=device)
        self.v = torch.full(shape, float("nan"), dtype=heads.dtype, device=device)
        # A real pool is never in order: pages come back as sequences end.
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(generator.initial_seed()))
        self._free = [int(page) for page in order.tolist()]
        self._generator = generator

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_keys: int) -> int:
        return -(-num_keys // self.page_size)

    def take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise ArgumentError(message("pages", f"at most the {len(self._free)} free pages", count, "Use a larger cache."))
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Iterable[int]) -> None:
        self._free.extend(pages)

    def write(self, slots: list[int]) -> None:
        """Fills slots (page * page_size + place in the page) with new random keys and values."""
        if not slots:
            return
        index = torch.tensor(slots, dtype=torch.int64).to(self.k.device)
        for cache in (self.k, self.v):
            rows = torch.randn((len(slots), *cache.shape[2:]), dtype=cache.dtype, device=cache.device, generator=self._generator)
            cache.view(-1, *cache.shape[2:]).index_copy_(0, index, rows)


@dataclass
class Sequence:
    """A request on its way: ``num_keys`` of its tokens lie in the cache, ``pages`` says where."""

    request: Request
    num_keys: int = 0
    pages: list[int] = field(default_factory=list)
    reserved_pages: int = 0

    @property
    def prompt_left(self) -> int:
        return max(0, self.request.context_tokens - self.num_keys)

    @property
    def is_done(self) -> bool:
        """The prompt's last step gives the first token of the answer, each step after it one more."""
        answer_steps = max(0, self.request.generated_tokens - 1)
        return self.num_keys >= self.request.context_tokens + answer_steps


@dataclass(frozen=True)
class Step:
    """One attention call of the engine.

    ``call`` holds the arguments of ``flashtile.decode``; lengths stand beside it for the host's own use.
    """

    kind: StepKind
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    call: dict[str, Any]

    @property
    def num_keys(self) -> int:
        return sum(self.seqlens_k)

    @property
    def num_queries(self) -> int:
        return sum(self.seqlens_q)


class Engine:
    """Continuous batching: each step decodes every running sequence and spends what is left of a token budget on prompts.

    A request is admitted, first come first served, once all the pages it will ever need can be promised to it; pages
    are taken as its keys arrive, and given back when it ends.
    """

    def __init__(
        self,
        heads: Heads,
        device: torch.device,
        *,
        num_pages: int,
        page_size: int = 16,
        max_running: int = 64,
        chunk_tokens: int = 512,
        max_draft_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        self.heads = heads
        self.device = device
        self.max_running = max_running
        self.chunk_tokens = chunk_tokens
        self.max_draft_tokens = max_draft_tokens
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._host_generator = torch.Generator().manual_seed(seed)
        self.cache = PagedCache(heads, num_pages, page_size, device, self._generator)
        self.waiting: deque[Request] = deque()
        self.running: list[Sequence] = []
        self.num_finished = 0
        self.num_refused = 0
        self._promised = 0

    def submit(self, request: Request) -> None:
        """Queues a request; one that the whole cache could not hold is refused and counted."""
        if self._pages_needed(request) > self.cache.num_pages:
            self.num_refused += 1
        else:
            self.waiting.append(request)

    def place(self, request: Request, num_keys: int) -> None:
        """Starts a request of which ``num_keys`` tokens already lie in the cache (an earlier turn, a shared prefix)."""
        if not self._admit(request):
            raise ArgumentError(message("request", "one that fits beside the running ones", request, "Use a larger cache."))
        self._append(self.running[-1], num_keys)

    def step(self, draft_tokens: int = 0) -> Step | None:
        """The next attention call, its new keys already in the cache; None where there is nothing to do.

        With ``draft_tokens`` every decoding sequence brings that many speculative tokens beside its own.
        """
        if not 0 <= draft_tokens <= self.max_draft_tokens:
            expected = f"0 to max_draft_tokens ({self.max_draft_tokens})"
            raise ArgumentError(message("draft_tokens", expected, draft_tokens, "Pages are promised for no more."))
        self._retire()
        while self.waiting and self._admit(self.waiting[0]):
            self.waiting.popleft()
        if not self.running:
            return None
        decoding = [sequence for sequence in self.running if not sequence.prompt_left]
        # A budget that decoding sequences use up must not starve prompts for ever.
        budget = max(self.chunk_tokens - (1 + draft_tokens) * len(decoding), self.cache.page_size)
        batch: list[tuple[Sequence, int]] = []
        for sequence in self.running:
            num_new = min(sequence.prompt_left, budget) if sequence.prompt_left else 1 + draft_tokens
            budget -= num_new if sequence.prompt_left else 0
            if num_new:
                batch.append((sequence, num_new))
        if len(batch) == len(decoding):
            kind: StepKind = "speculative" if draft_tokens else "decode"
        else:
            kind = "mixed" if decoding else "prefill"
        for sequence, num_new in batch:
            self._append(sequence, num_new)
        return self._make_step(kind, batch)

    def reject_drafts(self, draft_tokens: int) -> int:
        """Takes back a random number of each decoding sequence's drafts, as a verifier would; returns how many."""
        total = 0
        for sequence in self.running:
            spare = sequence.num_keys - sequence.request.context_tokens - 1
            limit = min(draft_tokens, max(0, spare))
            rejected = int(torch.randint(0, limit + 1, (), generator=self._host_generator))
            sequence.num_keys -= rejected
            total += rejected
        return total

    def _pages_needed(self, request: Request) -> int:
        return self.cache.pages_for(request.context_tokens + request.generated_tokens + self.max_draft_tokens)

    def _admit(self, request: Request) -> bool:
        needed = self._pages_needed(request)
        if len(self.running) >= self.max_running or self._promised + needed > self.cache.num_pages:
            return False
        self._promised += needed
        self.running.append(Sequence(request, reserved_pages=needed))
        return True

    def _retire(self) -> None:
        for sequence in self.running:
            if sequence.is_done:
                self.cache.give_back(sequence.pages)
                self._promised -= sequence.reserved_pages
                self.num_finished += 1
        self.running = [sequence for sequence in self.running if not sequence.is_done]

    def _append(self, sequence: Sequence, num_new: int) -> None:
        page_size, first = self.cache.page_size, sequence.num_keys
        missing = self.cache.pages_for(first + num_new) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self.cache.take(missing)
        self.cache.write([sequence.pages[key // page_size] * page_size + key % page_size for key in range(first, first + num_new)])
        sequence.num_keys += num_new

    def _make_step(self, kind: StepKind, batch: list[tuple[Sequence, int]]) -> Step:
        seqlens_q = tuple(num_new for _, num_new in batch)
        seqlens_k = tuple(sequence.num_keys for sequence, _ in batch)
        total_q, heads = sum(seqlens_q), self.heads
        q = torch.randn((total_q, heads.num_heads_q, heads.head_dim), dtype=heads.dtype, device=self.device, generator=self._generator)
        call: dict[str, Any] = {
            "k_cache": self.cache.k,
            "v_cache": self.cache.v,
            "seqlens_k": torch.tensor(seqlens_k, dtype=torch.int32).to(self.device),
            "page_table": self._page_table([sequence.pages for sequence, _ in batch]),
            "max_seqlen_k": max(seqlens_k),
        }
        if kind in ("decode", "speculative"):
            call["q"] = q.view(len(batch), seqlens_q[0], heads.num_heads_q, heads.head_dim)
        else:
            ends = torch.tensor((0, *seqlens_q)).cumsum(0)
            call |= {"q": q, "cu_seqlens_q": ends.to(torch.int32).to(self.device), "max_seqlen_q": max(seqlens_q)}
        return Step(kind, seqlens_q, seqlens_k, call)

    def _page_table(self, rows: list[list[int]]) -> torch.Tensor:
        """(batch, max_pages) int32; entries past a sequence's pages are -1."""
        width = -(-max(map(len, rows)) // TABLE_STEP) * TABLE_STEP
        table = [row + [-1] * (width - len(row)) for row in rows]
        return torch.tensor(table, dtype=torch.int32).to(self.device)
