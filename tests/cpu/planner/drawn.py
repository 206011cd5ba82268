"""Problems of forward and backward as hypothesis draws them, and a usual one of backward."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from flashtile.band import Band
from flashtile.problem import DTYPE_BYTES, Problem

bands = st.builds(Band, left=st.sampled_from([None, 0, 1, 5, 17, 64]), right=st.sampled_from([None, 0, 1, 9, 40]))


def training(seqlen: int = 4096, batch: int = 4, **facts: Any) -> Problem:
    usual = {"seqlen_k": seqlen, "num_heads_q": 16, "num_heads_kv": 16, "band": Band(None, 0), "lse": True}
    return Problem("backward", batch, seqlen, **{**usual, **facts})


def problems(operation: str, **more: st.SearchStrategy[Any]) -> st.SearchStrategy[Problem]:
    """Of every kind that both operations know; ``more`` has fields that this one knows alone."""

    def problem(group: int, num_heads_kv: int, dtype_q: str, alignment: int, **facts: Any) -> Problem:
        alignment = max(alignment, DTYPE_BYTES[dtype_q])
        return Problem(
            operation, num_heads_q=group * num_heads_kv, num_heads_kv=num_heads_kv, dtype_q=dtype_q, alignment=alignment, **facts
        )  # fmt: skip

    return st.builds(
        problem,
        group=st.sampled_from([1, 4, 7]),
        num_heads_kv=st.sampled_from([1, 8, 32]),
        batch=st.integers(0, 100),
        seqlen_q=st.sampled_from([0, 1, 16, 64, 100, 128, 2048, 65536]),
        seqlen_k=st.sampled_from([0, 1, 63, 777, 4096, 131072]),
        head_dim=st.sampled_from([8, 64, 72, 96, 128, 160, 192, 256]),
        head_dim_v=st.sampled_from([8, 64, 96, 128, 256]),
        dtype_q=st.sampled_from(["float16", "bfloat16", "float32"]),
        band=st.sampled_from([Band(None, 0), Band(), Band(1023, 0), Band(0, 0), Band(100, 200)]),
        ragged_q=st.booleans(),
        alibi=st.booleans(),
        softcap=st.booleans(),
        allow_tf32=st.booleans(),
        alignment=st.sampled_from([2, 8, 16]),
        **more,
    )
