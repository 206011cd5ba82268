"""Options that describe a problem without tensors, shared by the commands that plan."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import torch
import typer

from flashtile.band import Band
from flashtile.planner.device import Device
from flashtile.problem import Problem
from flashtile.rounding import length_bucket, query_bucket


class Operation(str, Enum):
    decode = "decode"
    forward = "forward"
    backward = "backward"


class Dtype(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"

    @property
    def torch(self) -> torch.dtype:
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[self.value]


class DtypeKv(str, Enum):
    float8_e4m3fn = "float8_e4m3fn"
    int8 = "int8"


class KvScales(str, Enum):
    none = "none"
    tensor = "tensor"
    head = "head"
    sequence = "sequence"


def parse_window(text: str) -> tuple[int | None, int | None]:
    """``left,right`` with an empty side or ``none`` for an unbounded one: ``1023,0`` or ``1023,``."""
    sides = [side.strip().lower() for side in text.split(",")]
    try:
        left, right = (None if side in ("", "none") else int(side) for side in sides)
    except ValueError:
        advice = "for example 1023,0 (leave a side empty if it has no bound)"
        raise typer.BadParameter(f"{text!r} is not left,right, {advice}.", param_hint="--window") from None
    return left, right


DeviceName = Annotated[str | None, typer.Option("--device", help="By name: h200, a100, t4, cpu. Default: the GPU here, else h200.")]
OperationName = Annotated[
    Operation, typer.Argument(help="decode: few queries over a cache. forward: prefill and training. backward: its gradients.")
]
SeqlenQ = Annotated[
    int | None,
    typer.Option("--seqlen-q", min=0, help="Queries a sequence. Default: 1; forward and backward, as many as keys."),
]
Heads = Annotated[int, typer.Option("--heads", min=1, help="Query heads.")]
KvHeads = Annotated[int, typer.Option("--kv-heads", min=1, help="Key heads.")]
HeadDim = Annotated[int, typer.Option("--head-dim", help="Size of a query and of a key.")]
HeadDimV = Annotated[int | None, typer.Option("--head-dim-v", help="Size of a value. Default: --head-dim.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of queries, keys and values.")]
DtypeKvOption = Annotated[
    DtypeKv | None, typer.Option("--dtype-kv", help="Of a quantised cache (decode, 16-bit queries). Default: --dtype.")
]
KvScalesOption = Annotated[KvScales, typer.Option("--kv-scales", help="What a quantised cache has a scale for each of.")]
PageSize = Annotated[int, typer.Option("--page-size", min=0, help="Keys a page; 0 for a contiguous cache.")]
Window = Annotated[str | None, typer.Option("--window", metavar="LEFT,RIGHT", help="Sliding window, e.g. 1023,0.")]
Causal = Annotated[bool, typer.Option("--causal/--no-causal", help="Whether a query sees only keys up to its own.")]
Softcap = Annotated[bool, typer.Option("--softcap", help="Scores pass through a tanh.")]
Alibi = Annotated[bool, typer.Option("--alibi", help="Scores get ALiBi biases.")]
Sinks = Annotated[bool, typer.Option("--sinks", help="Each head has a sink.")]
Dropout = Annotated[bool, typer.Option("--dropout", help="Entries of the softmax are dropped (forward and backward).")]
BlockM = Annotated[int | None, typer.Option("--block-m", help="Force the query tile: 1, 8, 16, 32, 64, 128 or 192.")]
NumSplits = Annotated[int | None, typer.Option("--num-splits", help="Force the number of splits (decode).")]


def make_problem(
    operation: Operation,
    *,
    batch: int,
    seqlen_q: int | None,
    seqlen_k: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    head_dim_v: int | None,
    dtype: Dtype,
    page_size: int,
    window: str | None,
    causal: bool,
    softcap: bool,
    alibi: bool,
    sinks: bool,
    dropout: bool,
    dtype_kv: DtypeKv | None = None,
    kv_scales: KvScales = KvScales.tensor,
) -> Problem:
    """The problem of a call with these shapes; lengths are rounded up to buckets, as a call's are."""
    decodes = operation is Operation.decode
    stored, scales = (dtype.value, "none") if dtype_kv is None else (dtype_kv.value, kv_scales.value)
    if seqlen_q is None:
        seqlen_q = 1 if decodes else seqlen_k
    return Problem(
        operation=operation.value,
        batch=batch,
        seqlen_q=seqlen_q if decodes else query_bucket(seqlen_q),
        seqlen_k=length_bucket(seqlen_k),
        num_heads_q=heads,
        num_heads_kv=kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim if head_dim_v is None else head_dim_v,
        dtype_q=dtype.value,
        dtype_k=stored,
        dtype_v=stored,
        k_scales=scales,
        v_scales=scales,
        band=Band.of(causal, None if window is None else parse_window(window)),
        softcap=softcap,
        alibi=alibi,
        sinks=sinks,
        dropout=dropout,
        lse=operation is Operation.backward,
        page_size=page_size,
    )


def named_device(name: str | None) -> tuple[Device, str]:
    """The figures to plan with, and one sentence on why these; raises ArgumentError for an unknown name."""
    if name is not None:
        device = Device.named(name)
        return device, f"those of {device.name}, as asked"
    if torch.cuda.is_available():
        device = Device.of(torch.device("cuda", torch.cuda.current_device()))
        return device, f"those of this machine's GPU, {device.name}"
    return Device.named("h200"), "those of an H200: this machine has no GPU and --device was not given"
