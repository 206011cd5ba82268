"""How many queries and keys a call may have: kernels count them in 32 bits."""

from __future__ import annotations

from flashtile.errors import UnsupportedError, message

MOST_TOKENS = 2**30  # that int32 positions can be moved by as much, as a window's side moves them


def check_most(name: str, count: int, what: str) -> None:
    """Raises UnsupportedError for more of ``what`` than kernels can count; ``name`` is the argument that holds them."""
    if count > MOST_TOKENS:
        fix = "Cut the call: merge folds results over parts of the keys, and queries go to several calls."
        raise UnsupportedError(message(name, f"at most 2^30 {what}", count, fix))
