"""Problem: the static facts of one attention call, hashable and free of tensors.

The constructors are the only code that inspects a caller's tensors: every complaint about an argument is raised here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flashtile.arguments import (
    check_bool,
    check_cache,
    check_cache_dtype,
    check_dropout,
    check_heads,
    check_hint,
    check_keys,
    check_kv_scales,
    check_leftpad,
    check_lengths,
    check_out,
    check_out_dtype,
    check_queries,
    check_same_dtype,
    check_scores,
    check_tensors,
    check_varlen,
    is_int,
)
from flashtile.band import Band
from flashtile.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError, message
from flashtile.rounding import alignment_of, length_bucket, query_bucket

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 1, "int8": 1}
QUANTISED = ("float8_e4m3fn", "int8")  # of keys and values alone: what is stored times a scale
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Problem:
    """One call's shapes, dtypes and features (lengths are maxima; real lengths stay on the device).

    ``operation`` is "decode", "forward" or "backward". ``ragged_q`` says that q is packed, ``ragged_k`` that k and v are (forward alone),
    ``seqused_k`` that a forward call's numbers of keys are on the device (a decode call's always are).

    ``seqlen_k`` is the most keys that a sequence may have; ``page_size`` is 0 for a contiguous cache; ``alignment`` is
    the largest power of two, at most 16, that divides every pointer and stride of q, k, v and a given out, in bytes.
    ``k_scales`` says what quantised keys have a scale for each of, "tensor", "head" or "sequence" (and head), or "none"; ``v_scales``
    says it of values. ``leftpad_k`` says that keys at the beginning of each sequence, as many as a tensor says, are seen by no query.
    ``after_append`` says that the launch before a decode call's wrote its keys, q or lengths, so that it may begin while that one ends.
    ``deterministic`` asks for the same bits each time, of the gradients of a backward problem; other results never vary.
    ``Problem.decode`` rounds ``seqlen_k`` up, and with ``ragged_q`` also ``seqlen_q`` and ``total_q``; ``Problem.forward``
    rounds all three. So neighbouring calls share one plan: kernels take the real sizes from the call's tensors.
    """

    operation: str = "decode"
    batch: int = 1
    seqlen_q: int = 1
    total_q: int = -1
    seqlen_k: int = 0
    num_heads_q: int = 1
    num_heads_kv: int = 1
    head_dim: int = 128
    head_dim_v: int = -1
    dtype_q: str = "bfloat16"
    dtype_k: str = ""
    dtype_v: str = ""
    dtype_out: str = ""
    band: Band = field(default_factory=lambda: Band(None, 0))
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    dropout: bool = False
    lse: bool = False
    page_size: int = 0
    ragged_q: bool = False
    ragged_k: bool = False
    seqused_k: bool = False
    alignment: int = 16
    k_scales: str = "none"
    v_scales: str = "none"
    leftpad_k: bool = False
    allow_tf32: bool = False
    deterministic: bool = False
    after_append: bool = False

    def __post_init__(self) -> None:
        _check_ints(self)
        fill = {
            "total_q": (-1, self.batch * self.seqlen_q),
            "head_dim_v": (-1, self.head_dim),
            "dtype_k": ("", self.dtype_q),
            "dtype_v": ("", self.dtype_k or self.dtype_q),
            "dtype_out": ("", self.dtype_q),
        }
        for name, (unset, value) in fill.items():
            if getattr(self, name) == unset:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "band", self.band.simplified(self.seqlen_q))
        _check_numbers(self)

    @property
    def group(self) -> int:
        """Query heads that share a key head (GQA); 1 where there are no heads at all."""
        return self.num_heads_q // self.num_heads_kv if self.num_heads_kv else 1

    @property
    def rows(self) -> int:
        """Packed rows of one sequence and key head: (query position, query head of the group)."""
        return self.seqlen_q * self.group

    @property
    def units(self) -> int:
        """Independent streams over keys: sequences x key heads."""
        return self.batch * self.num_heads_kv

    @property
    def keys_read(self) -> int:
        """Keys inside the union of the queries' windows: a window skips what lies outside."""
        return self.band.keys_seen(self.seqlen_q, self.seqlen_k)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that have to be read once."""
        per_key = self.head_dim * DTYPE_BYTES[self.dtype_k] + self.head_dim_v * DTYPE_BYTES[self.dtype_v]
        return self.units * self.keys_read * per_key

    @property
    def quantised(self) -> bool:
        """Whether keys and values are stored in one byte an element."""
        return self.dtype_k in QUANTISED

    @property
    def flops(self) -> int:
        """Multiplications and additions of both matrix products, over visible keys at most."""
        return 2 * self.total_q * self.num_heads_q * self.keys_read * (self.head_dim + self.head_dim_v)

    def with_(self, **changes: Any) -> Problem:
        return replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Problem:
        data: dict[str, Any] = json.loads(text)
        data["band"] = Band(**data["band"])
        return cls(**data)

    @classmethod
    def decode(
        cls,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        seqlens_k: torch.Tensor,
        *,
        page_table: torch.Tensor | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        leftpad_k: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        lse: bool = False,
        allow_tf32: bool = False,
        after_append: bool = False,
    ) -> Problem:
        """The problem of one decode call; raises for every wrong argument and reads no tensor's values."""
        import torch

        check_tensors({"q": q, "k_cache": k_cache, "v_cache": v_cache, "seqlens_k": seqlens_k}, page_table=page_table,
                      cu_seqlens_q=cu_seqlens_q, sinks=sinks, alibi_slopes=alibi_slopes, k_scale=k_scale, v_scale=v_scale,
                      leftpad_k=leftpad_k, out=out)  # fmt: skip
        ragged = cu_seqlens_q is not None
        batch = check_lengths(seqlens_k)
        _, total_q, seqlen_q, heads_q, head_dim = check_queries(q, cu_seqlens_q, max_seqlen_q, batch)
        heads_kv, head_dim_v, page_size, capacity = check_cache(k_cache, v_cache, page_table, batch)
        check_heads(heads_q, heads_kv, head_dim, k_cache=k_cache)
        check_cache_dtype(q, k_cache, v_cache)
        k_scales, v_scales = check_kv_scales(k_cache, heads_kv, batch, k_scale=k_scale, v_scale=v_scale)
        check_leftpad(leftpad_k, batch)
        dtype_out = check_out_dtype(q, out, out_dtype)
        check_out(out, (*q.shape[:-1], head_dim_v), dtype_out)
        check_scores(heads_q, batch, causal, softcap, scale, sinks, alibi_slopes, allow_tf32)
        check_bool("after_append", after_append)
        planned = check_hint(max_seqlen_k, capacity)
        return cls(
            operation="decode", batch=batch,
            seqlen_q=query_bucket(seqlen_q) if ragged else seqlen_q, total_q=query_bucket(total_q) if ragged else total_q,
            seqlen_k=length_bucket(planned),
            num_heads_q=heads_q, num_heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v,
            dtype_q=_name_of(q.dtype), dtype_k=_name_of(k_cache.dtype), dtype_out=_name_of(dtype_out),
            k_scales=k_scales, v_scales=v_scales, leftpad_k=leftpad_k is not None,
            band=Band.of(causal, window), softcap=softcap != 0.0, alibi=alibi_slopes is not None,
            sinks=sinks is not None, lse=lse, page_size=page_size, ragged_q=ragged,
            alignment=alignment_of(q, k_cache, v_cache, out), allow_tf32=allow_tf32 and q.dtype == torch.float32,
            after_append=after_append,
        )  # fmt: skip

    @classmethod
    def forward(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        *,
        page_table: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        out: torch.Tensor | None = None,
        lse: bool = False,
        allow_tf32: bool = False,
    ) -> Problem:
        """The problem of one ``attention`` or ``attention_varlen`` call; raises for every wrong argument and reads no tensor's values."""
        import torch

        check_tensors({"q": q, "k": k, "v": v}, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, page_table=page_table,
                      seqused_k=seqused_k, sinks=sinks, alibi_slopes=alibi_slopes, out=out)  # fmt: skip
        check_varlen(cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
                     page_table=page_table, seqused_k=seqused_k)  # fmt: skip
        packed = cu_seqlens_q is not None
        batch, total_q, seqlen_q, heads_q, head_dim = check_queries(q, cu_seqlens_q, max_seqlen_q)
        heads_kv, head_dim_v, page_size, room = check_keys(k, v, cu_seqlens_k, page_table, seqused_k, batch, packed)
        check_heads(heads_q, heads_kv, head_dim, k=k)
        check_same_dtype(q, k=k, v=v)
        check_out(out, (*q.shape[:-1], head_dim_v), q.dtype)
        check_dropout(dropout_p)
        check_scores(heads_q, batch, causal, softcap, scale, sinks, alibi_slopes, allow_tf32)
        planned = check_hint(max_seqlen_k, room, "all keys of k" if page_table is None else "all pages of a sequence")
        rounded = query_bucket(seqlen_q)
        return cls(
            operation="forward", batch=batch,
            seqlen_q=rounded, total_q=query_bucket(total_q) if packed else batch * rounded, seqlen_k=length_bucket(planned),
            num_heads_q=heads_q, num_heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v, dtype_q=_name_of(q.dtype),
            band=Band.of(causal, window), softcap=softcap != 0.0, alibi=alibi_slopes is not None, sinks=sinks is not None,
            dropout=dropout_p != 0.0, lse=lse, page_size=page_size, ragged_q=packed, ragged_k=cu_seqlens_k is not None,
            seqused_k=seqused_k is not None,
            alignment=alignment_of(q, k, v, out), allow_tf32=allow_tf32 and q.dtype == torch.float32,
        )  # fmt: skip


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_ints(p: Problem) -> None:
    for name in ("batch", "total_q", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "head_dim", "head_dim_v", "page_size"):
        if not is_int(getattr(p, name)):
            raise ArgumentError(message(name, "an int", repr(getattr(p, name)), "A problem holds sizes, not tensors."))


def _check_numbers(p: Problem) -> None:
    if p.dropout and (p.operation == "decode" or p.page_size):
        keys = "keys in pages" if p.page_size else "decode"
        raise UnsupportedError(
            message("dropout_p", f"0.0 for {keys}", "dropout", "It is for training: with attention, or attention_varlen on packed keys.")
        )
    for name in ("batch", "total_q", "seqlen_q", "seqlen_k", "page_size"):
        if getattr(p, name) < 0:
            raise ArgumentError(message(name, "a count that is not negative", getattr(p, name), "Use 0 for nothing."))
    if p.num_heads_kv < 1 or p.num_heads_q < 1 or p.num_heads_q % p.num_heads_kv:
        raise ShapeError(
            message(
                "num_heads_q",
                f"a positive multiple of num_heads_kv ({p.num_heads_kv})",
                p.num_heads_q,
                "Every key head serves the same number of query heads.",
            )
        )
    for name in ("head_dim", "head_dim_v"):
        value = getattr(p, name)
        if not 8 <= value <= MAX_HEAD_DIM or value % 8:
            longer = "No kernel has longer heads; flashtile.reference computes them, slowly."
            fix = longer if value > MAX_HEAD_DIM else "Pad the heads with zeros to a multiple of 8."
            raise ShapeError(message(name, f"a multiple of 8 from 8 to {MAX_HEAD_DIM}", value, fix))
    for name in ("dtype_q", "dtype_k", "dtype_v", "dtype_out"):
        able = [dtype for dtype in DTYPE_BYTES if name in ("dtype_k", "dtype_v") or dtype not in QUANTISED]
        if getattr(p, name) not in able:
            raise DtypeError(message(name, f"one of {sorted(able)}", getattr(p, name), "Cast the tensor first."))
    if p.alignment not in (1, 2, 4, 8, 16):
        raise ArgumentError(message("alignment", "1, 2, 4, 8 or 16 bytes", p.alignment, "Use 16 for tensors as torch allocates them."))
