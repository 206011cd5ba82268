"""What happens in a call: find the prepared kernel, allocate, run; and the same as operators for torch.compile.

A call is checked, planned and bound to a kernel once for each key of its facts; after that it costs a dictionary lookup.
No kernel module is imported before a plan names it. Each operation has its module; importing them registers the operators
``flashtile::decode``, ``flashtile::append_kv``, ``flashtile::forward`` and ``flashtile::backward``.
"""

from __future__ import annotations

from flashtile.ops import append, backward, decode, forward, forward_operator
from flashtile.ops.autocast import cast_by_autocast
from flashtile.ops.prepared import kernel_module

__all__ = ["append", "backward", "cast_by_autocast", "decode", "forward", "forward_operator", "kernel_module"]
