"""Attention over several GPUs, on torch.distributed: sequences, or a key-value cache, cut over ranks by position.

Partial results over different keys merge exactly (`flashtile.merge`), wherever they were computed; so everything here is attention
over parts, moved by torch's process groups.
"""

from __future__ import annotations

from flashtile.distributed.attention import attention, attention_with_lse
from flashtile.distributed.cache_shards import CacheShards
from flashtile.distributed.choose import Choice, Estimate, Workload, choose, decode_speedup
from flashtile.distributed.decode import append_kv, decode, decode_with_lse
from flashtile.distributed.exchange import Exchange, explain_exchange
from flashtile.distributed.links import LINKS, NETWORK_400G, NVLINK, Link
from flashtile.distributed.sequence_shards import SequenceShards

__all__ = [
    "CacheShards",
    "Choice",
    "Estimate",
    "Exchange",
    "LINKS",
    "Link",
    "NETWORK_400G",
    "NVLINK",
    "SequenceShards",
    "Workload",
    "append_kv",
    "attention",
    "attention_with_lse",
    "choose",
    "decode",
    "decode_speedup",
    "decode_with_lse",
    "explain_exchange",
]
