"""The CPU engine's shortest way: sequences of one length, read in place, by one call of torch's kernel.

Where a call takes 100 us, each operation beside the kernel costs a percent. So this path prepares what it can when it is
bound, keeps masks, and lays rows out anew only where heads are packed.
"""

from __future__ import annotations

from collections.abc import Callable

from flashtile.kernels.call import DecodeCall
from flashtile.kernels.cpu_mask import whole_part
from flashtile.kernels.cpu_scores import flash, splits_of
from flashtile.problem import Problem


def bind_whole(problem: Problem) -> Callable[[DecodeCall], bool]:
    """Runs a call in one piece, or returns False with nothing written where its lengths do not allow that.

    For problems that torch's kernel computes by itself, but for packed rows, lengths and the band.
    """
    batch, seqlen_q, heads_kv, group, head_dim = (
        problem.batch, problem.seqlen_q, problem.num_heads_kv, problem.group, problem.head_dim
    )  # fmt: skip
    band = None if problem.band.is_full else problem.band
    packed = (batch, heads_kv, seqlen_q * group, head_dim)
    parted = (batch, seqlen_q, heads_kv, group, head_dim)

    def run(call: DecodeCall) -> bool:
        q, k, v, out = call.q, call.k_cache, call.v_cache, call.out
        lengths = call.seqlens_k.tolist()
        first, last, mask = 0, lengths[0], None
        capacity = k.shape[1]
        if not 0 < last <= capacity or (batch > 1 and lengths.count(last) != batch):
            return False
        if band is not None:
            part = whole_part(band, seqlen_q, last, group)
            if part is None:
                return False
            first, last, mask = part
        if mask is None and batch == 1 and splits_of(batch, heads_kv, last - first) > 1:
            return False
        if last - first < capacity:
            k, v = k[:, first:last], v[:, first:last]
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if group == 1:
            rows, lse = flash(q.transpose(1, 2), k, v, attn_mask=mask, scale=call.scale)
            out.copy_(rows.transpose(1, 2))
        elif seqlen_q == 1:
            rows, lse = flash(q.view(packed), k, v, attn_mask=mask, scale=call.scale)
            out.view(packed).copy_(rows)
        else:
            rows = q.view(parted).transpose(1, 2).reshape(packed)
            rows, lse = flash(rows, k, v, attn_mask=mask, scale=call.scale)
            out.view(parted).copy_(rows.view(batch, heads_kv, seqlen_q, group, head_dim).transpose(1, 2))
        if call.lse is not None:
            call.lse.view(batch, heads_kv, group, seqlen_q).copy_(lse.view(batch, heads_kv, seqlen_q, group).transpose(2, 3))
        return True

    return run
