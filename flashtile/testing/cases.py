"""Decode cases: each the description of one call, small enough for Triton's interpreter and nasty enough to matter."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flashtile.problem import QUANTISED


@dataclass(frozen=True)
class Case:
    """One decode call.

    ``seqlens_k`` has one length a sequence; ``seqlens_q`` is one length for all (batch-first q), or one a sequence
    with ``ragged_q`` (packed q and cu_seqlens_q). ``page_size`` 0 is a contiguous cache; ``capacity`` is the keys a
    sequence has room for (by default a few more than the longest). ``window`` is (left, right). ``offset_elements``
    makes q and the caches views that start so many elements into a larger buffer. ``logit_scale`` multiplies q, so
    that the running maximum moves and old partial sums really are rescaled. ``spare_rows`` are rows of a packed q
    that belong to no sequence. ``dtype_kv`` is that of a quantised cache, whose scales are of ``k_scales`` and ``v_scales`` each ("none",
    "tensor", "head" or "sequence"). ``missing_pages`` replaces that many table entries inside each sequence by absurd ids.
    ``leftpad_k`` has how many of each sequence's keys are padding, before the others.
    """

    name: str
    seqlens_k: tuple[int, ...]
    seqlens_q: int | tuple[int, ...] = 1
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 64
    head_dim_v: int = 0
    dtype: str = "float16"
    dtype_kv: str = ""
    k_scales: str = "none"
    v_scales: str = "none"
    page_size: int = 0
    capacity: int | None = None
    layout: str = "NHD"
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    alibi: bool = False
    alibi_per_sequence: bool = False
    sinks: bool = False
    ragged_q: bool = False
    spare_rows: int = 0
    missing_pages: int = 0
    leftpad_k: tuple[int, ...] = ()
    offset_elements: int = 0
    logit_scale: float = 1.0
    scale: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.seqlens_q, tuple) and not self.ragged_q:
            raise ValueError(f"case {self.name}: seqlens_q as a tuple needs ragged_q=True")
        if isinstance(self.seqlens_q, tuple) and len(self.seqlens_q) != len(self.seqlens_k):
            raise ValueError(f"case {self.name}: {len(self.seqlens_q)} query lengths for {len(self.seqlens_k)} sequences")
        if self.layout not in ("NHD", "HND"):
            raise ValueError(f"case {self.name}: layout is NHD or HND, not {self.layout}")
        if not self.head_dim_v:
            object.__setattr__(self, "head_dim_v", self.head_dim)

    @property
    def batch(self) -> int:
        return len(self.seqlens_k)

    @property
    def query_lengths(self) -> tuple[int, ...]:
        """One query length a sequence, however the case says it."""
        return self.seqlens_q if isinstance(self.seqlens_q, tuple) else (self.seqlens_q,) * self.batch

    @property
    def room(self) -> int:
        """Keys that each sequence has room for; with pages, a multiple of the page size."""
        room = max(self.seqlens_k, default=0) + 3 if self.capacity is None else self.capacity
        return room if not self.page_size else -(-room // self.page_size) * self.page_size


def _lengths() -> list[Case]:
    return [
        Case("one_key", (1,)),
        Case("length_5", (5,), num_heads_kv=1),
        Case("length_17_bf16", (17,), dtype="bfloat16", num_heads_q=8, num_heads_kv=1),
        Case("around_64", (63, 64, 65), num_heads_q=2, num_heads_kv=1),
        Case("length_130_fp32", (130,), dtype="float32"),
        Case("length_zero", (0, 33, 0), num_heads_kv=4),
        Case("all_lengths_zero", (0, 0), capacity=16),
        Case("no_capacity", (0,), capacity=0),
        Case("beyond_capacity", (500, 20), capacity=70),
        Case("negative_length", (-3, 20)),
        Case("batch_zero", ()),
        Case("no_queries", (9, 40), seqlens_q=0),
    ]


def _queries() -> list[Case]:
    return [
        Case("speculative_4", (70, 131), seqlens_q=4, num_heads_q=8, dtype="bfloat16"),
        Case("speculative_3_not_causal", (70,), seqlens_q=3, causal=False),
        Case("queries_17_mqa", (100,), seqlens_q=17, num_heads_q=6, num_heads_kv=1),
        Case("more_queries_than_keys", (5, 0, 12), seqlens_q=9),
        Case("more_queries_sinks_fp32", (5,), seqlens_q=9, sinks=True, dtype="float32"),
        Case("ragged", (64, 33, 90), seqlens_q=(1, 5, 20), ragged_q=True),
        Case("ragged_zero_queries_bf16", (64, 33, 90), seqlens_q=(0, 3, 0), ragged_q=True, dtype="bfloat16"),
        Case("ragged_single_tokens", (1, 100, 65), seqlens_q=1, ragged_q=True, num_heads_q=8, num_heads_kv=1),
        Case("ragged_spare_rows", (40, 25), seqlens_q=(2, 3), ragged_q=True, spare_rows=4),
        Case("ragged_no_queries", (40, 25), seqlens_q=(0, 0), ragged_q=True),
        Case("ragged_batch_zero", (), seqlens_q=(), ragged_q=True),
        Case("ragged_batch_zero_spare_rows", (), seqlens_q=(), ragged_q=True, spare_rows=3, page_size=16, capacity=32, sinks=True),
        Case("ragged_prefill_paged", (130, 40, 70), seqlens_q=(40, 1, 8), ragged_q=True, page_size=16, dtype="bfloat16"),
    ]


def _shapes() -> list[Case]:
    return [
        Case("dim_8_mha", (65, 17), num_heads_kv=4, head_dim=8),
        Case("dim_40", (65,), head_dim=40, dtype="bfloat16", seqlens_q=2),
        Case("dim_80_paged_3", (65, 20), head_dim=80, page_size=3),
        Case("dim_96_hnd", (65, 20), head_dim=96, layout="HND"),
        Case("dim_128_group_8", (130,), head_dim=128, num_heads_q=8, num_heads_kv=1, dtype="bfloat16"),
        Case("dim_256", (70,), head_dim=256, num_heads_q=2, num_heads_kv=1),
        Case("dim_256_fp32_queries_5", (40,), head_dim=256, num_heads_q=2, dtype="float32", seqlens_q=5),
        Case("value_dim_larger", (65, 130), head_dim=64, head_dim_v=128),
        Case("value_dim_smaller_paged", (65, 30), head_dim=96, head_dim_v=40, page_size=16, dtype="bfloat16"),
        Case("group_3", (50,), num_heads_q=6, num_heads_kv=2, seqlens_q=3),
        Case("offset_by_one", (65, 30), offset_elements=1, head_dim=40),
        Case("offset_by_one_paged_fp32", (65, 30), offset_elements=1, page_size=16, dtype="float32", seqlens_q=2),
        Case("large_logits", (130, 64), logit_scale=16.0),
        Case("large_logits_fp32_queries_3", (130,), logit_scale=24.0, dtype="float32", seqlens_q=3),
        Case("custom_scale", (65,), scale=0.25, dtype="bfloat16"),
        Case("negative_scale", (65,), scale=-0.25),
    ]


def _pages() -> list[Case]:
    return [
        Case("pages_of_1", (17, 64, 5), page_size=1),
        Case("pages_of_3_hnd", (17, 65), page_size=3, layout="HND", dtype="bfloat16"),
        Case("pages_of_16", (130, 16, 0), page_size=16, num_heads_q=8),
        Case("pages_of_64_fp32", (130, 63), page_size=64, dtype="float32"),
        Case("pages_missing", (70, 48), page_size=16, missing_pages=1),
        Case("pages_all_missing_sinks", (20,), page_size=16, missing_pages=2, sinks=True),
        Case("pages_beyond_capacity", (400,), page_size=16, capacity=48),
    ]


def _features() -> list[Case]:
    return [
        Case("window_left", (130, 20), window=(31, 0)),
        Case("window_zero", (65,), window=(0, 0), seqlens_q=4),
        Case("window_both_sides", (100, 40), window=(16, 4), causal=False, seqlens_q=7),
        Case("window_right_only", (100,), window=(None, 5), causal=False, seqlens_q=12, dtype="bfloat16"),
        Case("window_paged_ragged", (130, 70, 5), window=(40, None), page_size=16, seqlens_q=(1, 6, 9), ragged_q=True),
        Case("softcap", (65, 130), softcap=20.0, logit_scale=8.0),
        Case("softcap_window_bf16", (130,), softcap=5.0, window=(50, None), dtype="bfloat16", seqlens_q=2),
        Case("alibi", (65, 17), alibi=True, seqlens_q=3),
        Case("alibi_per_sequence_paged", (65, 100), alibi=True, alibi_per_sequence=True, page_size=3, dtype="bfloat16"),
        Case("alibi_not_causal_fp32", (40,), alibi=True, causal=False, seqlens_q=9, dtype="float32"),
        Case("sinks", (65, 0, 1), sinks=True),
        Case("sinks_ragged_bf16", (65, 20), sinks=True, seqlens_q=(3, 1), ragged_q=True, dtype="bfloat16", num_heads_q=8),
        Case("leftpad", (130, 40, 65, 0), leftpad_k=(70, 0, 64, 0)),
        Case("leftpad_all_keys_bf16", (33, 20), leftpad_k=(33, 19), seqlens_q=2, sinks=True, dtype="bfloat16"),
        Case("leftpad_absurd", (50, 20, 9), leftpad_k=(-7, 500, 3), seqlens_q=3, num_heads_q=8),
        Case(
            "leftpad_paged_window", (130, 70), leftpad_k=(37, 66), page_size=16, window=(90, None), seqlens_q=(1, 6), ragged_q=True,
            missing_pages=1, alibi=True,
        ),
        Case(
            "everything", (130, 5, 66), seqlens_q=(3, 8, 1), ragged_q=True, num_heads_q=8, head_dim=40, head_dim_v=80, page_size=16,
            window=(60, None), softcap=15.0, alibi=True, sinks=True, spare_rows=2, logit_scale=6.0, dtype="bfloat16",
        ),
        Case(
            "everything_contiguous_fp32", (90, 12), seqlens_q=3, head_dim=80, head_dim_v=24, layout="HND", window=(30, None),
            softcap=10.0, alibi=True, sinks=True, offset_elements=1, logit_scale=6.0, dtype="float32",
        ),
    ]  # fmt: skip


SMALL_CASES: list[Case] = [*_lengths(), *_queries(), *_shapes(), *_pages(), *_features()]


def quantised(case: Case, turn: int) -> Case:
    """The case with a quantised cache: by ``turn``, which dtype, and what its keys and values have scales for each of."""
    granularities = ("none", "tensor", "head", "sequence")
    return replace(
        case,
        name=f"{case.name}-{QUANTISED[turn % 2]}",
        dtype=case.dtype if case.dtype != "float32" else "bfloat16",
        dtype_kv=QUANTISED[turn % 2],
        k_scales=granularities[turn // 2 % 4],
        v_scales=granularities[(turn // 2 + turn // 8 + 1) % 4],
    )


QUANTISED_CASES: list[Case] = [quantised(case, turn) for turn, case in enumerate(SMALL_CASES)]
