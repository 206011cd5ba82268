"""How tensors of a call are described to the compiler and handed to a kernel: what operations on GPUs have in common.

A tensor is passed as a view (tile/views.py): to ``Spec`` a view of ``Arg``, at a launch the same view of numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashtile.band import Band
from flashtile.dropout import scale_of, threshold_of
from flashtile.kernels.call import Dropout
from flashtile.kernels.launch import Launch
from flashtile.kernels.spec import TRITON_DTYPES, Arg
from flashtile.kernels.tile.softmax import LOG2E
from flashtile.kernels.tile.views import (
    BandView,
    DropoutView,
    KeysView,
    KvScalesView,
    LengthsView,
    LseView,
    PagesView,
    RowsView,
    ScoresView,
    StatisticsView,
    TokensView,
    band_view,
)
from flashtile.problem import DTYPE_BYTES, Problem

FAR = 2**31  # elements that an int32 offset cannot span
_LOG2E: float = LOG2E.value

Pointer = Callable[[torch.Tensor], Any]
Layout = tuple[bool, bool]
"""(far, same): the strides of keys, or the span of a tile of them, leave 32 bits; V is laid out like K, so that one offset serves both."""


def rows_spec(problem: Problem, dtype: str) -> RowsView:
    """q or out, of a dtype."""
    stride = Arg("i64", divisor(problem, dtype))
    return RowsView(Arg("*" + TRITON_DTYPES[dtype], problem.alignment), stride, stride, stride)


def keys_specs(problem: Problem, layout: Layout) -> dict[str, KeysView]:
    """k and v of a kernel that reads them by pointers."""
    return walked_specs(problem, layout, k=problem.dtype_k, v=problem.dtype_v)


def walked_specs(problem: Problem, layout: Layout, **dtypes: str) -> dict[str, KeysView]:
    """Two tensors, by name, that a kernel walks tile by tile: ``layout`` is theirs."""
    far, same = layout

    def walked(dtype: str, own_strides: bool) -> KeysView:
        pointer = Arg("*" + TRITON_DTYPES[dtype], problem.alignment)
        if not own_strides:
            return KeysView(pointer, None, None, None)
        reach = Arg("i64" if far else "i32", divisor(problem, dtype))
        return KeysView(pointer, reach, reach, Arg("i64", divisor(problem, dtype)))

    return {name: walked(dtype, i == 0 or not same) for i, (name, dtype) in enumerate(dtypes.items())}


def shared_specs(problem: Problem) -> dict[str, Any]:
    """Parameters that every kernel over keys in a cache has: lse, pages, scores, band and sinks, None where the problem is without."""
    i32, i64 = Arg("i32"), Arg("i64")
    return {
        "lse": lse_spec() if problem.lse else LseView(None, None, None, None),
        "pages": PagesView(Arg("*i32"), i64, i32) if problem.page_size else PagesView(None, None, None),
        "scores": scores_spec(problem),
        "band": band_spec(problem.band),
        "sinks": Arg("*fp32") if problem.sinks else None,
    }


def lse_spec() -> LseView:
    """lse, or another float32 number a row."""
    i64 = Arg("i64")
    return LseView(Arg("*fp32"), i64, i64, i64)


def statistics_spec() -> StatisticsView:
    """What the backward's first kernel writes of each query, and its passes read."""
    return StatisticsView(Arg("*fp32"), Arg("*fp32"), Arg("i64"), Arg("i64"))


def scores_spec(problem: Problem) -> ScoresView:
    """What happens to q.k."""
    return ScoresView(
        Arg("fp32"),
        Arg("fp32") if problem.softcap else None,
        Arg("*fp32") if problem.alibi else None,
        Arg("i64") if problem.alibi else None,
    )


def kv_scales_spec(problem: Problem) -> KvScalesView:
    """The scales of quantised keys and values."""
    given, absent = (Arg("*fp32"), Arg("i64"), Arg("i64")), (None, None, None)
    return KvScalesView(*(absent if problem.k_scales == "none" else given), *(absent if problem.v_scales == "none" else given))


def lengths_spec(problem: Problem) -> LengthsView:
    """What a decode call knows of its sequences."""
    starts, i32 = Arg("*i32"), Arg("i32")
    return LengthsView(starts, starts if problem.ragged_q else None, i32, i32, i32, starts if problem.leftpad_k else None)


def dropout_spec(problem: Problem) -> DropoutView:
    """Which entries of the softmax are dropped, None where nothing is."""
    return DropoutView(Arg("*i64"), Arg("u32"), Arg("fp32")) if problem.dropout else DropoutView(None, None, None)


def band_spec(band: Band) -> BandView:
    """A band's sides, None where they are unbounded."""
    return BandView(*(None if side is None else Arg("i32") for side in band_view(band)))


def tokens_spec(problem: Problem) -> TokensView:
    """What a forward or backward call knows of its sequences."""
    i32 = Arg("i32")
    return TokensView(
        Arg("*i32") if problem.ragged_q else None,
        Arg("*i32") if problem.ragged_k else None,
        Arg("*i32") if problem.seqused_k else None,
        i32, i32, i32, i32,
    )  # fmt: skip


def divisor(problem: Problem, dtype: str) -> int:
    """What divides every stride of a tensor, in elements."""
    return max(1, problem.alignment // DTYPE_BYTES[dtype])


def pipeline_stages(problem: Problem, block_n: int, num_stages: int) -> int:
    """What Triton must be told for a ring of ``num_stages`` tiles.

    Keys behind a gathered page id are loads behind loads: the compiler shares the stages out between both.
    """
    gathered = problem.page_size and problem.page_size % block_n
    return 2 * num_stages - 1 if gathered else num_stages


def usual_layout(problem: Problem) -> Layout:
    """K and V as they are commonly allocated; other layouts are compiled when they come."""
    return False, problem.head_dim == problem.head_dim_v


def with_keys(
    problem: Problem, block_n: int, pointer: Pointer, launch_of: Callable[[Layout], Launch]
) -> Callable[[torch.Tensor, torch.Tensor], tuple[Launch, tuple[Any, ...], tuple[Any, ...]]]:
    """A function of k and v, batch first, paged or packed: the launch for their layout, and their views.

    ``launch_of`` compiles for a layout; the usual one is asked for at once.
    """
    far_stride = FAR // block_n
    launches = {layout: launch_of(layout) for layout in [usual_layout(problem)]}

    def views(k: torch.Tensor, v: torch.Tensor) -> tuple[Launch, tuple[Any, ...], tuple[Any, ...]]:
        k_strides, v_strides = k.stride(), v.stride()
        if len(k_strides) == 3:
            k_strides, v_strides = (0, *k_strides), (0, *v_strides)
        same = k_strides == v_strides
        far = k_strides[0] >= FAR or k_strides[1] >= far_stride or v_strides[0] >= FAR or v_strides[1] >= far_stride
        launch = launches.get((far, same))
        if launch is None:
            launch = launches[far, same] = launch_of((far, same))
        return launch, (pointer(k), *k_strides[:3]), (pointer(v), None, None, None) if same else (pointer(v), *v_strides[:3])

    return views


def scores_view(scale: float, softcap: float, slopes: torch.Tensor | None, pointer: Pointer) -> tuple[Any, ...]:
    """What happens to q.k: ``scores`` of a launch."""
    if slopes is None:
        return scale * _LOG2E, softcap or None, None, None
    return scale * _LOG2E, softcap or None, pointer(slopes), slopes.stride(0) if slopes.ndim == 2 else 0


def kv_scales_view(k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, pointer: Pointer) -> tuple[Any, ...]:
    """``kv_scales`` of a launch: each of one element, (hk,) or (b, hk), or None for 1."""
    return *_scale_view(k_scale, pointer), *_scale_view(v_scale, pointer)


def _scale_view(scale: torch.Tensor | None, pointer: Pointer) -> tuple[Any, ...]:
    if scale is None:
        return None, None, None
    if scale.numel() == 1:
        return pointer(scale), 0, 0
    return (pointer(scale), 0, scale.stride(0)) if scale.ndim == 1 else (pointer(scale), *scale.stride())


def dropout_view(dropout: Dropout | None, pointer: Pointer) -> tuple[Any, ...]:
    """Which entries of the softmax are dropped: ``dropout`` of a launch."""
    if dropout is None:
        return None, None, None
    return pointer(dropout.seed), threshold_of(dropout.p), scale_of(dropout.p)


def lse_view(lse: torch.Tensor | None, pointer: Pointer) -> tuple[Any, ...]:
    """lse (b, hq, seqlen_q), or (hq, total_q) with no stride over sequences; None where it is not wanted."""
    if lse is None:
        return None, None, None, None
    return (pointer(lse), *lse.stride()) if lse.ndim == 3 else (pointer(lse), 0, *lse.stride())


def rows_view(x: torch.Tensor, pointer: Pointer) -> tuple[Any, ...]:
    """q or out, batch first or packed."""
    return (pointer(x), *x.stride()[:3]) if x.ndim == 4 else (pointer(x), 0, *x.stride()[:2])
