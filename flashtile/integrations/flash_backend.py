"""flashtile below torch's scaled_dot_product_attention: one of the implementations of its flash backend on CUDA.

torch 2.11 and newer let a library offer one (``torch.nn.attention.register_flash_attention_impl``). Once it is active, every call that
torch gives to its flash backend comes here, in eager mode, from C++ and from compiled graphs: float16 and bfloat16 on CUDA, no mask, and
a causal mask only where lengths are equal. Calls that torch gives to other backends (cuDNN, memory-efficient, math) do not; see
``torch.nn.attention.sdpa_kernel``. ``torch.nn.attention.varlen`` keeps torch's own kernels.
"""

from __future__ import annotations

import torch

from flashtile import ops
from flashtile.dropout import draw_seed
from flashtile.errors import UnsupportedError
from flashtile.flash_attn.conventions import cut, readable, scale_for

NAME = "flashtile"
Forwarded = tuple[torch.Tensor, torch.Tensor, None, None, int, int, torch.Tensor, torch.Tensor, torch.Tensor]
"""out, lse, two starts that only packed calls have, the longest lengths, the seed, and two tensors that torch does not use."""


def register_flash_implementation() -> None:
    """Offers flashtile to torch, as ``"flashtile"``; ``torch.nn.attention.activate_flash_attention_impl("flashtile")`` takes the offer, and
    ``restore_flash_attention_impl()`` ends it.

    Raises:
        UnsupportedError: this torch has no such registry.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as error:
        raise UnsupportedError(f"torch {torch.__version__} takes no flash implementations of others. Use `routed`.") from error
    register_flash_attention_impl(NAME, register_fn=_activate)


class _Active:
    """What torch keeps while the implementation is active: the kernels live as long as their library."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()  # type: ignore[no-untyped-call]  # a reference to it may be left in a traceback: do not wait for the last one
        self.library = None


def _activate() -> _Active:
    library = torch.library.Library("aten", "IMPL", "CUDA")  # type: ignore[no-untyped-call]
    library.impl("_scaled_dot_product_flash_attention", forward, "CUDA")  # type: ignore[no-untyped-call]
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CUDA")  # type: ignore[no-untyped-call]
    return _Active(library)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Forwarded:
    """``aten::_scaled_dot_product_flash_attention``: query (batch, heads, seqlen_q, head_dim), lse (batch, heads, seqlen_q) float32."""
    if return_debug_mask:
        raise UnsupportedError("return_debug_mask: expected False, got True. The entries that dropout drops are never stored.")
    q, k, v = (readable(x.transpose(1, 2)) for x in (query, key, value))
    out = torch.empty_like(query)  # laid out like query, as torch's compiler expects of this operator
    rows = out.transpose(1, 2)
    seed = draw_seed(query.device) if dropout_p else torch.zeros((2,), dtype=torch.int64, device=query.device)
    with torch.no_grad():
        written, lse = ops.forward.forward(
            q, k, v, None, None, None, None, None, None, is_causal, None, 0.0, scale_for(query, scale), None, None,
            rows if rows.stride(-1) == 1 and rows.shape == q.shape else None, None, None, False, None, True, dropout_p,
            seed if dropout_p else None,
        )  # fmt: skip
        if written is not rows:
            rows.copy_(cut(written, rows.shape[-1]))
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    debug_mask = torch.empty((0,), dtype=query.dtype, device=query.device)
    return out, lse, None, None, query.shape[2], key.shape[2], seed.view(torch.uint64), unused, debug_mask  # type: ignore[return-value]


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``aten::_scaled_dot_product_flash_attention_backward``: the gradients of query, key and value."""
    q, k, v, rows, dout = (readable(x.transpose(1, 2)) for x in (query, key, value, out, grad_out))
    seed = philox_seed.view(torch.int64) if dropout_p else None
    with torch.no_grad():
        dq, dk, dv, _ = ops.backward.backward(
            q, k, v, rows, logsumexp.contiguous(), dout, None, None, None, None, None, None, is_causal, None, 0.0, scale_for(query, scale),
            None, None, False, None, False, dropout_p, seed,
        )  # fmt: skip
    return cut(dq, query.shape[-1]).transpose(1, 2), cut(dk, key.shape[-1]).transpose(1, 2), cut(dv, value.shape[-1]).transpose(1, 2)
