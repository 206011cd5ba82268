"""How many heads take turns in the order of row blocks (tile/order.py): the host's part, for every kernel that has that order."""

from __future__ import annotations

import torch

from flashtile.problem import DTYPE_BYTES, Problem

_L2_SHARE = 0.5  # of the cache, for the keys of the heads that are taken together
_WALKS_AT_BEST = 2  # of the longest row block's time that a section keeps all SMs busy
_SMS_A_HEAD = 8  # that read the same keys at the same time, so that L2 need not hold them for long
_L2_BYTES = 32 << 20  # where no device says


def heads_at_once(problem: Problem, device: torch.device, block_m: int) -> int:
    """Query heads whose row blocks take turns (tile/order.py), all of a key head's together, in sections of like size.

    As many as L2 holds the keys of. But a section's row blocks, the longest first, are to keep all SMs busy for longer than the
    longest one takes, or SMs wait for it at the end; more heads than L2 holds do no harm while several SMs read the same keys
    at the same time.
    """
    if problem.band.right is None or problem.band.left is not None:
        # all row blocks take equally long: nothing is gained by taking the last ones first
        return problem.group
    l2_bytes, num_sms = _L2_BYTES, 1
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        l2_bytes, num_sms = properties.L2_cache_size, properties.multi_processor_count
    per_key = problem.head_dim * DTYPE_BYTES[problem.dtype_k] + problem.head_dim_v * DTYPE_BYTES[problem.dtype_v]
    held = problem.group * max(1, int(_L2_SHARE * l2_bytes) // max(1, problem.seqlen_k * per_key))
    # a head's row blocks take half as long as they would, were all as long as the longest
    longest = -(-2 * num_sms // (-(-problem.seqlen_q // block_m) + 1))
    wanted = max(held, min(_WALKS_AT_BEST * longest, num_sms // _SMS_A_HEAD), longest)
    heads = max(1, problem.num_heads_q * (1 if problem.ragged_q else problem.batch))
    sections = max(1, heads // wanted)
    return problem.group * -(-heads // (sections * problem.group))
