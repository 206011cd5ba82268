"""Forward cases: each the description of one call of ``attention`` or ``attention_varlen``, small and nasty."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardCase:
    """One forward call.

    ``seqlens_q`` and ``seqlens_k`` are one length each for ``batch`` sequences (``attention``), or one a sequence
    (``attention_varlen``, where ``batch`` follows). Of a varlen call, ``seqlens_k`` are the keys that cu_seqlens_k says; with
    ``page_size`` they are ``seqused_k``, and ``capacity`` is the keys that a row of the page table has room for (by default a
    few more than the longest). ``seqused_k`` says how many of packed keys count.

    ``padding`` is memory after the last position of each sequence (of a packed tensor: after its last row) that belongs to no
    tensor: q, k and v are views of something larger, NaN there. ``spare_rows`` of a packed q and ``spare_keys`` of packed k and v are
    rows of the tensor that belong to no sequence. ``missing_pages`` replaces that many table entries inside each sequence by
    absurd ids. ``offset_elements`` makes q, k and v start so many elements into their buffers. ``logit_scale`` multiplies q, and
    ``rising`` makes keys grow along the sequence, so that maxima move and old partial sums are rescaled at most steps.
    """

    name: str
    seqlens_q: int | tuple[int, ...]
    seqlens_k: int | tuple[int, ...]
    batch: int = 1
    num_heads_q: int = 2
    num_heads_kv: int = 1
    head_dim: int = 64
    head_dim_v: int = 0
    dtype: str = "float16"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    alibi: bool = False
    alibi_per_sequence: bool = False
    sinks: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    logit_scale: float = 1.0
    rising: bool = False
    layout: str = "NHD"
    offset_elements: int = 0
    padding: int = 3
    spare_rows: int = 0
    spare_keys: int = 0
    seqused_k: tuple[int, ...] | None = None
    page_size: int = 0
    capacity: int | None = None
    missing_pages: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seqlens_q, tuple) != isinstance(self.seqlens_k, tuple):
            raise ValueError(f"case {self.name}: seqlens_q and seqlens_k are both one number or both a tuple")
        if isinstance(self.seqlens_q, tuple) and isinstance(self.seqlens_k, tuple):
            if len(self.seqlens_q) != len(self.seqlens_k):
                raise ValueError(f"case {self.name}: {len(self.seqlens_q)} query lengths for {len(self.seqlens_k)} sequences")
            object.__setattr__(self, "batch", len(self.seqlens_q))
        if not self.varlen and (self.page_size or self.seqused_k or self.spare_rows or self.spare_keys):
            raise ValueError(f"case {self.name}: pages, seqused_k and spare rows need one length a sequence")
        if self.page_size and (self.seqused_k or self.spare_keys):
            raise ValueError(f"case {self.name}: seqused_k and spare_keys are for packed keys")
        if self.layout not in ("NHD", "HND"):
            raise ValueError(f"case {self.name}: layout is NHD or HND, not {self.layout}")
        if not self.head_dim_v:
            object.__setattr__(self, "head_dim_v", self.head_dim)

    @property
    def varlen(self) -> bool:
        """Whether this is a call of ``attention_varlen``."""
        return isinstance(self.seqlens_q, tuple)

    @property
    def query_lengths(self) -> tuple[int, ...]:
        """One query length a sequence, however the case says it."""
        return self.seqlens_q if isinstance(self.seqlens_q, tuple) else (self.seqlens_q,) * self.batch

    @property
    def stored_lengths(self) -> tuple[int, ...]:
        """Each sequence's keys that exist, whether they count or not."""
        lengths = self.seqlens_k if isinstance(self.seqlens_k, tuple) else (self.seqlens_k,) * self.batch
        return tuple(min(max(n, 0), self.room) for n in lengths) if self.page_size else lengths

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Each sequence's keys that count."""
        if self.seqused_k is None:
            return self.stored_lengths
        return tuple(min(max(used, 0), stored) for used, stored in zip(self.seqused_k, self.stored_lengths))

    @property
    def room(self) -> int:
        """Keys that a row of the page table has room for, a multiple of the page size; 0 without pages."""
        if not self.page_size or not isinstance(self.seqlens_k, tuple):
            return 0
        room = max(self.seqlens_k, default=0) + 3 if self.capacity is None else self.capacity
        return -(-room // self.page_size) * self.page_size


def _tails() -> list[ForwardCase]:
    """Each length around tile edges, for queries as for keys, full and causal."""
    full = [(1, 1), (63, 65), (64, 64), (129, 127), (128, 128), (191, 193), (1, 129)]
    causal = [(65, 63), (127, 129), (192, 192), (193, 191), (129, 1), (63, 64)]
    return [ForwardCase(f"q{m}_k{n}", m, n, dtype="bfloat16") for m, n in full] + [
        ForwardCase(f"q{m}_k{n}_causal", m, n, causal=True, num_heads_kv=2) for m, n in causal
    ]


def _lengths() -> list[ForwardCase]:
    return [
        ForwardCase("few_queries_causal", 7, 150, batch=2, causal=True, dtype="bfloat16"),
        ForwardCase("more_queries_than_keys_causal", 150, 20, causal=True),
        ForwardCase("more_queries_sinks_causal_fp32", 70, 9, causal=True, sinks=True, dtype="float32"),
        ForwardCase("contiguous", 100, 100, batch=2, causal=True, padding=0),
        ForwardCase("batch_zero", 5, 9, batch=0),
        ForwardCase("no_queries", 0, 9, batch=2),
        ForwardCase("no_keys", 5, 0, batch=2, causal=True),
        ForwardCase("no_keys_sinks", 5, 0, sinks=True),
    ]


def _shapes() -> list[ForwardCase]:
    return [
        ForwardCase("dim_8_mha", 65, 70, num_heads_kv=2, head_dim=8, causal=True),
        ForwardCase("dim_40", 40, 65, head_dim=40, dtype="bfloat16"),
        ForwardCase("dim_80_hnd", 65, 65, batch=2, head_dim=80, layout="HND", causal=True),
        ForwardCase("dim_96", 70, 130, head_dim=96, dtype="bfloat16", causal=True),
        ForwardCase("dim_128_group_4", 130, 140, num_heads_q=4, head_dim=128, dtype="bfloat16", causal=True),
        ForwardCase("dim_192", 70, 100, head_dim=192, num_heads_kv=2),
        ForwardCase("dim_192_value_128", 100, 129, head_dim=192, head_dim_v=128, dtype="bfloat16", causal=True),
        ForwardCase("dim_64_value_128", 65, 66, head_dim=64, head_dim_v=128),
        ForwardCase("dim_256", 65, 97, head_dim=256, dtype="bfloat16", causal=True),
        ForwardCase("dim_256_fp32", 33, 40, head_dim=256, dtype="float32"),
        ForwardCase("value_dim_smaller_fp32", 33, 70, head_dim=80, head_dim_v=24, dtype="float32", causal=True),
        ForwardCase("group_3", 50, 80, batch=2, num_heads_q=6, num_heads_kv=2, causal=True),
        ForwardCase("mqa_5", 20, 130, num_heads_q=5, dtype="bfloat16", causal=True),
        ForwardCase("hnd_fp32", 65, 130, batch=2, layout="HND", num_heads_q=4, num_heads_kv=2, dtype="float32", causal=True),
        ForwardCase("offset_by_one", 65, 130, batch=2, offset_elements=1),
        ForwardCase("offset_by_one_hnd_fp32", 40, 66, offset_elements=1, layout="HND", head_dim=40, dtype="float32", causal=True),
    ]


def _scores() -> list[ForwardCase]:
    return [
        ForwardCase("window_left", 130, 150, causal=True, window=(31, 0)),
        ForwardCase("window_zero", 70, 66, window=(0, 0), dtype="bfloat16"),
        ForwardCase("window_both_sides", 140, 200, window=(40, 17), num_heads_q=4),
        ForwardCase("window_right_only", 66, 130, window=(None, 5), dtype="bfloat16"),
        ForwardCase("window_left_only", 130, 129, window=(64, None), sinks=True),
        ForwardCase("softcap", 65, 130, softcap=20.0, logit_scale=8.0, causal=True),
        ForwardCase("softcap_window_bf16", 130, 130, softcap=5.0, window=(50, 0), dtype="bfloat16"),
        ForwardCase("alibi", 65, 100, alibi=True, causal=True, num_heads_q=4),
        ForwardCase("alibi_per_sequence_full", 66, 40, batch=2, alibi=True, alibi_per_sequence=True, dtype="bfloat16"),
        ForwardCase("sinks", 65, 130, sinks=True, causal=True, dtype="bfloat16", num_heads_q=4, num_heads_kv=2),
        ForwardCase("custom_scale", 65, 65, scale=0.25, dtype="bfloat16"),
        ForwardCase("negative_scale", 65, 130, scale=-0.25, causal=True),
        ForwardCase("large_logits", 129, 260, logit_scale=16.0, rising=True),
        ForwardCase("large_logits_causal_fp32", 65, 193, logit_scale=24.0, rising=True, dtype="float32", causal=True),
        ForwardCase("large_logits_dim_128_bf16", 64, 257, logit_scale=12.0, rising=True, head_dim=128, dtype="bfloat16"),
        ForwardCase(
            "everything_fp32", 70, 90, batch=2, head_dim=80, head_dim_v=24, num_heads_q=4, num_heads_kv=2, layout="HND", window=(30, 9),
            softcap=10.0, alibi=True, alibi_per_sequence=True, sinks=True, offset_elements=1, logit_scale=6.0, dtype="float32",
        ),
    ]  # fmt: skip


def _packed() -> list[ForwardCase]:
    return [
        ForwardCase("varlen", (65, 1, 130), (65, 1, 130), causal=True),
        ForwardCase("varlen_cross_bf16", (64, 33, 90), (129, 7, 90), dtype="bfloat16", num_heads_q=4, num_heads_kv=2),
        ForwardCase("varlen_empty_on_either_side", (0, 20, 5, 0), (9, 0, 70, 0), causal=True, sinks=True),
        ForwardCase("varlen_spare_rows", (20, 30), (40, 25), spare_rows=70, spare_keys=5, causal=True, dtype="bfloat16"),
        ForwardCase("varlen_all_empty", (0, 0), (0, 0), spare_rows=3),
        ForwardCase("varlen_batch_zero", (), (), spare_rows=3, spare_keys=4, sinks=True),
        ForwardCase("varlen_no_rows", (0, 0), (5, 9), padding=0),
        ForwardCase("varlen_seqused", (40, 30, 3), (70, 66, 9), seqused_k=(33, 0, 9), causal=True),
        ForwardCase("varlen_seqused_absurd_fp32", (9, 20), (30, 40), seqused_k=(-4, 500), dtype="float32", spare_keys=3),
        ForwardCase("varlen_hnd_offset", (20, 66), (20, 66), layout="HND", offset_elements=1, num_heads_kv=2, causal=True),
        ForwardCase("varlen_window_alibi", (70, 20), (130, 90), window=(40, 3), alibi=True, alibi_per_sequence=True),
        ForwardCase("varlen_dim_192_128_bf16", (33, 66), (80, 66), head_dim=192, head_dim_v=128, dtype="bfloat16", causal=True),
        ForwardCase(
            "varlen_everything", (70, 0, 12, 65), (130, 5, 66, 20), seqused_k=(100, 5, 66, 20), num_heads_q=4, num_heads_kv=2, head_dim=40,
            head_dim_v=80, window=(60, 4), softcap=15.0, alibi=True, sinks=True, spare_rows=2, spare_keys=2, logit_scale=6.0,
            dtype="bfloat16",
        ),
    ]  # fmt: skip


def _paged() -> list[ForwardCase]:
    return [
        ForwardCase("pages_of_1", (5, 17), (17, 30), page_size=1, causal=True),
        ForwardCase("pages_of_3_hnd", (17, 2), (17, 65), page_size=3, layout="HND", dtype="bfloat16"),
        ForwardCase("pages_of_16", (66, 1, 20), (130, 16, 0), page_size=16, causal=True, num_heads_q=4, spare_rows=2),
        ForwardCase("pages_of_64_fp32", (20, 63), (130, 63), page_size=64, dtype="float32", causal=True),
        ForwardCase("pages_of_128_bf16", (65, 129), (257, 128), page_size=128, head_dim=128, dtype="bfloat16", causal=True),
        ForwardCase("pages_of_16_value_dim", (40,), (70,), page_size=16, head_dim=96, head_dim_v=40, causal=True),
        ForwardCase("pages_missing", (33, 48), (70, 48), page_size=16, missing_pages=1, causal=True),
        ForwardCase("pages_all_missing_sinks", (9,), (20,), page_size=16, missing_pages=2, sinks=True),
        ForwardCase("pages_beyond_capacity", (20, 5), (400, -3), page_size=16, capacity=48),
        ForwardCase("pages_window_softcap", (70,), (200,), page_size=16, window=(50, 0), softcap=15.0, logit_scale=6.0),
        ForwardCase("pages_offset_by_one", (20,), (40,), page_size=16, offset_elements=1, causal=True),
        ForwardCase("pages_batch_zero", (), (), page_size=16, capacity=32, spare_rows=3),
    ]  # fmt: skip


def _dropping() -> list[ForwardCase]:
    return [
        ForwardCase("dropout", 65, 130, dropout_p=0.3, batch=2, num_heads_q=4, dtype="bfloat16"),
        ForwardCase("dropout_causal", 193, 191, dropout_p=0.1, causal=True, num_heads_kv=2),
        ForwardCase("dropout_one_query_fp32", 1, 129, dropout_p=0.5, dtype="float32"),
        ForwardCase("dropout_almost_all", 70, 66, dropout_p=0.98, num_heads_q=4),
        ForwardCase("dropout_window_softcap", 130, 150, dropout_p=0.2, window=(31, 5), softcap=15.0, logit_scale=6.0, dtype="bfloat16"),
        ForwardCase("dropout_sinks_alibi", 65, 90, dropout_p=0.25, num_heads_q=4, sinks=True, alibi=True, causal=True, dtype="float32"),
        ForwardCase("dropout_dim_96", 70, 130, dropout_p=0.15, head_dim=96, dtype="bfloat16", causal=True),
        ForwardCase("dropout_value_dim", 40, 97, dropout_p=0.4, head_dim=64, head_dim_v=128),
        ForwardCase("dropout_dim_192_hnd", 65, 65, dropout_p=0.1, head_dim=192, layout="HND", batch=2, scale=-0.1),
        ForwardCase(
            "dropout_varlen", (65, 1, 0, 130), (97, 64, 20, 129), dropout_p=0.2, causal=True, num_heads_q=4, sinks=True, spare_rows=2,
            spare_keys=3, seqused_k=(97, 33, 20, 120),
        ),
    ]  # fmt: skip


DROPOUT_CASES: list[ForwardCase] = _dropping()
"""Calls with dropout, which kernels may take or leave to others; not among FORWARD_CASES."""

FORWARD_CASES: list[ForwardCase] = [*_tails(), *_lengths(), *_shapes(), *_scores(), *_packed(), *_paged()]
