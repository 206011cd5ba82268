"""Problem: the static facts of one attention call, hashable and free of tensors.

The constructors are the only code that inspects a caller's tensors: every complaint about an argument is raised here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flashtile.band import Band
from flashtile.errors import ArgumentError, DtypeError, ShapeError, message

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Problem:
    """One decode call's shapes, dtypes and features (lengths are maxima; real lengths stay on the device).

    ``seqlen_k`` is the most keys that a sequence may have; ``page_size`` is 0 for a contiguous cache; ``alignment`` is
    the largest power of two, at most 16, that divides every pointer and stride in bytes.
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
    lse: bool = False
    page_size: int = 0
    ragged_q: bool = False
    alignment: int = 16
    kv_scales: str = "none"
    allow_tf32: bool = False

    def __post_init__(self) -> None:
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
        out: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        lse: bool = False,
        allow_tf32: bool = False,
    ) -> Problem:
        """The problem of one decode call; raises for every wrong argument and reads no tensor's values."""
        import torch

        _check_tensors(q=q, k_cache=k_cache, v_cache=v_cache, seqlens_k=seqlens_k, page_table=page_table,
                       cu_seqlens_q=cu_seqlens_q, sinks=sinks, alibi_slopes=alibi_slopes, out=out)  # fmt: skip
        ragged = cu_seqlens_q is not None
        batch = _check_lengths(seqlens_k)
        total_q, seqlen_q, heads_q, head_dim = _check_queries(q, cu_seqlens_q, max_seqlen_q, batch)
        heads_kv, head_dim_v, page_size, capacity = _check_cache(k_cache, v_cache, page_table, batch)
        _check_heads(heads_q, heads_kv, head_dim, k_cache)
        dtypes = _check_dtypes(q, k_cache, v_cache, out, out_dtype)
        _check_out(out, (*q.shape[:-1], head_dim_v))
        for name, vector in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
            _check_per_head(name, vector, heads_q, batch if name == "alibi_slopes" else None)
        _check_number("softcap", softcap, minimum=0.0)
        if scale is not None:
            _check_number("scale", scale)
        if max_seqlen_k is not None and not 0 <= max_seqlen_k <= capacity:
            raise ArgumentError(
                message("max_seqlen_k", f"at most the cache's capacity, {capacity} keys", max_seqlen_k, "Leave it out to plan for the capacity.")
            )
        name = lambda dtype: str(dtype).removeprefix("torch.")  # noqa: E731
        measured = [q, k_cache, v_cache] + ([out] if out is not None else [])
        return cls(
            operation="decode", batch=batch, seqlen_q=seqlen_q, total_q=total_q,
            seqlen_k=length_bucket(capacity if max_seqlen_k is None else max_seqlen_k),
            num_heads_q=heads_q, num_heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v,
            dtype_q=name(dtypes[0]), dtype_k=name(dtypes[1]), dtype_v=name(dtypes[2]), dtype_out=name(dtypes[3]),
            band=Band.of(causal, window), softcap=softcap != 0.0, alibi=alibi_slopes is not None,
            sinks=sinks is not None, lse=lse, page_size=page_size, ragged_q=ragged,
            alignment=min((alignment_of(t) for t in measured), default=16), allow_tf32=allow_tf32 and q.dtype == torch.float32,
        )  # fmt: skip


def length_bucket(length: int) -> int:
    """Rounds a length up to one of eight steps an octave (at least 64 keys a step), so that growth rarely replans."""
    if length <= 0:
        return 0
    step = max(64, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


def alignment_of(tensor: torch.Tensor) -> int:
    """The largest power of two, at most 16, that divides the tensor's address and outer strides in bytes."""
    mixed = tensor.data_ptr() | 16
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]):
        if size > 1:
            mixed |= stride * tensor.element_size()
    return mixed & -mixed


def _check_numbers(p: Problem) -> None:
    for name in ("batch", "total_q", "seqlen_q", "seqlen_k", "page_size"):
        if getattr(p, name) < 0:
            raise ArgumentError(message(name, "a count that is not negative", getattr(p, name), "Use 0 for nothing."))
    if p.num_heads_kv < 1 or p.num_heads_q < 1 or p.num_heads_q % p.num_heads_kv:
        raise ShapeError(
            message("num_heads_q", f"a positive multiple of num_heads_kv ({p.num_heads_kv})", p.num_heads_q, "Every key head serves the same number of query heads.")
        )
    for name in ("head_dim", "head_dim_v"):
        value = getattr(p, name)
        if not 8 <= value <= MAX_HEAD_DIM or value % 8:
            raise ShapeError(message(name, f"a multiple of 8 from 8 to {MAX_HEAD_DIM}", value, "Pad the heads with zeros to a multiple of 8."))
    for name in ("dtype_q", "dtype_k", "dtype_v", "dtype_out"):
        if getattr(p, name) not in DTYPE_BYTES:
            raise DtypeError(message(name, f"one of {sorted(DTYPE_BYTES)}", getattr(p, name), "Cast the tensor first."))
    if p.alignment not in (1, 2, 4, 8, 16):
        raise ArgumentError(message("alignment", "1, 2, 4, 8 or 16 bytes", p.alignment, "Use 16 for tensors as torch allocates them."))


def _check_tensors(*, q: torch.Tensor, **others: torch.Tensor | None) -> None:
    import torch

    for name, tensor in {"q": q, **others}.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise DtypeError(message(name, "a torch.Tensor", type(tensor).__name__, "Wrap it with torch.tensor(...)."))
        if tensor.device != q.device:
            raise ArgumentError(message(name, f"a tensor on q's device, {q.device}", tensor.device, f"Move it with {name}.to(q.device)."))


def _check_lengths(seqlens_k: torch.Tensor) -> int:
    _check_int32("seqlens_k", seqlens_k, rank=1)
    return int(seqlens_k.shape[0])


def _check_int32(name: str, tensor: torch.Tensor, rank: int) -> None:
    import torch

    if tensor.dtype != torch.int32:
        raise DtypeError(message(name, "dtype int32", tensor.dtype, f"Use {name}.to(torch.int32)."))
    if tensor.ndim != rank:
        raise ShapeError(message(name, f"a tensor of rank {rank}", f"shape {tuple(tensor.shape)}", "Reshape it."))
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(message(name, "a contiguous last dimension", f"strides {tensor.stride()}", f"Use {name}.contiguous()."))


def _check_queries(
    q: torch.Tensor, cu_seqlens_q: torch.Tensor | None, max_seqlen_q: int | None, batch: int
) -> tuple[int, int, int, int]:
    if cu_seqlens_q is None:
        if q.ndim != 4:
            raise ShapeError(
                message("q", "shape (batch, seqlen_q, num_heads, head_dim)", f"shape {tuple(q.shape)}", "Packed queries (total_q, num_heads, head_dim) need cu_seqlens_q.")
            )
        if q.shape[0] != batch:
            raise ShapeError(message("seqlens_k", f"one length for each of q's {q.shape[0]} sequences", f"{batch} lengths", "Pass shape (batch,)."))
        if max_seqlen_q is not None and max_seqlen_q != q.shape[1]:
            raise ArgumentError(message("max_seqlen_q", f"q's seqlen_q, {q.shape[1]}", max_seqlen_q, "It is only needed with cu_seqlens_q."))
        total_q, seqlen_q = q.shape[0] * q.shape[1], q.shape[1]
    else:
        if q.ndim != 3:
            raise ShapeError(message("q", "shape (total_q, num_heads, head_dim) with cu_seqlens_q", f"shape {tuple(q.shape)}", "Pack the sequences: q.flatten(0, 1)."))
        _check_int32("cu_seqlens_q", cu_seqlens_q, rank=1)
        if cu_seqlens_q.shape[0] != batch + 1:
            raise ShapeError(message("cu_seqlens_q", f"batch + 1 = {batch + 1} entries", f"{cu_seqlens_q.shape[0]}", "Its first entry is 0, its last total_q."))
        total_q = q.shape[0]
        if max_seqlen_q is None:
            raise ArgumentError(message("max_seqlen_q", "the longest query of the batch with cu_seqlens_q", None, "Pass an int; the device is not read for it."))
        if not isinstance(max_seqlen_q, int) or not 0 <= max_seqlen_q <= total_q:
            raise ArgumentError(message("max_seqlen_q", f"an int from 0 to total_q ({total_q})", max_seqlen_q, "Pass the longest query's length."))
        seqlen_q = max_seqlen_q
    _check_last_dim("q", q)
    return total_q, seqlen_q, q.shape[-2], q.shape[-1]


def _check_last_dim(name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(
            message(name, "a contiguous last dimension (stride 1)", f"strides {tensor.stride()}", f"Use {name}.contiguous(); nothing is copied silently.")
        )


def _check_cache(
    k: torch.Tensor, v: torch.Tensor, page_table: torch.Tensor | None, batch: int
) -> tuple[int, int, int, int]:
    kind = "(batch, capacity, num_heads_kv, head_dim)" if page_table is None else "(num_pages, page_size, num_heads_kv, head_dim)"
    for name, cache in (("k_cache", k), ("v_cache", v)):
        if cache.ndim != 4:
            raise ShapeError(message(name, f"shape {kind}", f"shape {tuple(cache.shape)}", "A cache in HND order is a transposed view: cache.transpose(1, 2)."))
        _check_last_dim(name, cache)
    if k.shape[:3] != v.shape[:3]:
        raise ShapeError(message("v_cache", f"k_cache's leading shape {tuple(k.shape[:3])}", tuple(v.shape[:3]), "Only the last dimension may differ."))
    if page_table is None:
        if k.shape[0] != batch:
            raise ShapeError(message("k_cache", f"{batch} sequences, one for each length in seqlens_k", f"shape {tuple(k.shape)}", "Pass page_table for a paged cache."))
        return k.shape[2], v.shape[3], 0, k.shape[1]
    _check_int32("page_table", page_table, rank=2)
    if page_table.shape[0] != batch:
        raise ShapeError(message("page_table", f"{batch} rows, one for each sequence", f"shape {tuple(page_table.shape)}", "Pass shape (batch, max_pages)."))
    if k.shape[1] < 1:
        raise ShapeError(message("k_cache", "a page size of at least 1", f"shape {tuple(k.shape)}", "Pages lie in the second dimension."))
    return k.shape[2], v.shape[3], k.shape[1], page_table.shape[1] * k.shape[1]


def _check_heads(heads_q: int, heads_kv: int, head_dim: int, k: torch.Tensor) -> None:
    if k.shape[3] != head_dim:
        raise ShapeError(message("k_cache", f"q's head_dim, {head_dim}", k.shape[3], "q and k_cache share the last dimension; v_cache may differ."))
    if heads_kv < 1 or heads_q < 1 or heads_q % heads_kv:
        raise ShapeError(
            message("q", f"a number of heads that is a positive multiple of k_cache's {heads_kv}", heads_q, "Every key head serves the same number of query heads.")
        )


def _check_dtypes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None, out_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]:
    import torch

    allowed = (torch.float16, torch.bfloat16, torch.float32)
    if q.dtype not in allowed:
        raise DtypeError(message("q", "dtype float16, bfloat16 or float32", q.dtype, "Cast it with q.to(torch.bfloat16)."))
    for name, cache in (("k_cache", k), ("v_cache", v)):
        if cache.dtype != q.dtype:
            raise DtypeError(message(name, f"q's dtype, {q.dtype}", cache.dtype, f"Cast it with {name}.to(q.dtype), or q to the cache's."))
    wanted = out_dtype or (out.dtype if out is not None else q.dtype)
    if wanted not in (q.dtype, torch.float32):
        raise DtypeError(message("out_dtype", f"q's dtype, {q.dtype}, or float32", wanted, "float32 returns partial results for merge()."))
    if out is not None and out.dtype != wanted:
        raise DtypeError(message("out", f"dtype {wanted}", out.dtype, "Let out and out_dtype agree."))
    return q.dtype, k.dtype, v.dtype, wanted


def _check_out(out: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if out is None:
        return
    if tuple(out.shape) != shape:
        raise ShapeError(message("out", f"shape {shape}", f"shape {tuple(out.shape)}", "Leave it out to have it allocated."))
    _check_last_dim("out", out)


def _check_per_head(name: str, tensor: torch.Tensor | None, heads: int, batch: int | None) -> None:
    if tensor is None:
        return
    import torch

    shapes = [(heads,)] + ([(batch, heads)] if batch is not None else [])
    if tuple(tensor.shape) not in shapes:
        raise ShapeError(message(name, f"shape {' or '.join(map(str, shapes))}", f"shape {tuple(tensor.shape)}", "One value for each query head."))
    if tensor.dtype != torch.float32:
        raise DtypeError(message(name, "dtype float32", tensor.dtype, f"Use {name}.float()."))
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ShapeError(message(name, "a contiguous last dimension", f"strides {tensor.stride()}", f"Use {name}.contiguous()."))


def _check_number(name: str, value: object, minimum: float | None = None) -> None:
    import math

    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentError(message(name, "a finite Python number", repr(value), "Tensors are not read on the host."))
    if minimum is not None and value < minimum:
        raise ArgumentError(message(name, f"at least {minimum}", value, f"Use {name}=0.0 to switch it off." if name == "softcap" else ""))
