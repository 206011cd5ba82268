"""The checks of a call's arguments: shapes, dtypes, strides, devices and numbers, never a tensor's values.

Each raises the error that names the argument, what was expected, what came and what would work.
"""

from __future__ import annotations

from flashtile.arguments.gradients import check_differentiable, check_no_out, check_no_tangent, needs_gradient
from flashtile.arguments.keys import check_cache, check_heads, check_hint, check_keys, check_leftpad, check_lengths
from flashtile.arguments.quantised import check_cache_dtype, check_kv_scales
from flashtile.arguments.queries import check_queries, check_varlen
from flashtile.arguments.tensors import check_out, check_out_dtype, check_same_dtype, check_tensors
from flashtile.arguments.values import check_bool, check_dropout, check_number, check_scores, is_int

__all__ = [
    "check_bool",
    "check_cache",
    "check_cache_dtype",
    "check_differentiable",
    "check_dropout",
    "check_heads",
    "check_hint",
    "check_keys",
    "check_kv_scales",
    "check_leftpad",
    "check_lengths",
    "check_no_out",
    "check_no_tangent",
    "check_number",
    "check_out",
    "check_out_dtype",
    "check_queries",
    "check_same_dtype",
    "check_scores",
    "check_tensors",
    "check_varlen",
    "is_int",
    "needs_gradient",
]
