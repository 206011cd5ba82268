"""Quantised tiles: two codes of one byte lie in shared memory as one element of 16 bits, which ldmatrix reads like any other.

A register of an operand then holds four codes. Of keys these are four neighbouring dims of one key, and become two registers
of two float16 dims; of values two neighbouring dims of two keys, and become a register of two keys for each dim. So nothing
moves between threads; what moves is the order of dims: that of q's columns with K's, and of the accumulator's with V's.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# four codes in $2, two registers of two float16 out: e4m3 by the instruction for it, in which a NaN stays one
_E4M3 = "mov.b32 {lo, hi}, t; cvt.rn.f16x2.e4m3x2 $0, lo; cvt.rn.f16x2.e4m3x2 $1, hi; }"
_E4M3_SIDE_BY_SIDE = gl.constexpr("{ .reg .b32 t; .reg .b16 lo, hi; mov.b32 t, $2; " + _E4M3)
_E4M3_BY_TWOS = gl.constexpr("{ .reg .b32 t; .reg .b16 lo, hi; prmt.b32 t, $2, 0, 0x3120; " + _E4M3)
# integers as the low byte of 1024 + 128 + n, from which 1152 is taken
_INT8 = (
    "{{ .reg .b32 t, c; xor.b32 t, $2, 0x80808080; mov.b32 c, 0x64806480; "
    "prmt.b32 $0, t, 0x64646464, {0}; prmt.b32 $1, t, 0x64646464, {1}; sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c; }}"
)
_INT8_SIDE_BY_SIDE = gl.constexpr(_INT8.format("0x4140", "0x4342"))
_INT8_BY_TWOS = gl.constexpr(_INT8.format("0x4240", "0x4341"))


@gluon.constexpr_function
def holds_codes(dtype):
    """Whether a tile's elements are pairs of codes: uint16 of e4m3, int16 of int8."""
    return dtype == gl.uint16 or dtype == gl.int16


@gluon.constexpr_function
def stored_dim(dim, dtype):
    """Elements of a tile's row that hold ``dim`` values."""
    return dim // 2 if holds_codes(dtype) else dim


@gluon.jit
def columns_as_keys(q):
    """q [rows, dim] with its columns in the order of ``keys_as_half``: of every four, first the former two, then the latter."""
    fours = gl.reshape(q, [q.shape[0], q.shape[1] // 4, 2, 2])
    return gl.reshape(gl.permute(fours, (0, 2, 1, 3)), [q.shape[0], q.shape[1]])


@gluon.jit
def columns_in_order(acc):
    """[warps, rows, dim] of ``values_as_half``'s columns, in the order of the dims."""
    halves = gl.reshape(acc, [acc.shape[0], acc.shape[1], 2, acc.shape[2] // 2])
    return gl.reshape(gl.permute(halves, (0, 1, 3, 2)), [acc.shape[0], acc.shape[1], acc.shape[2]])


@gluon.jit
def keys_as_half(pairs):
    """Keys [warps, dim / 2, keys] of codes, as an operand holds them, in float16: [warps, dim, keys], dims as ``columns_as_keys``."""
    ASM: gl.constexpr = _INT8_SIDE_BY_SIDE if pairs.dtype == gl.int16 else _E4M3_SIDE_BY_SIDE
    former, latter = gl.inline_asm_elementwise(ASM, "=&r,=&r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2)
    both = gl.permute(gl.join(former, latter), (0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(both, [pairs.shape[0], 2 * pairs.shape[1], pairs.shape[2]]), pairs.type.layout)


@gluon.jit
def values_as_half(pairs):
    """Values [warps, keys, dim / 2] of codes, as an operand holds them, in float16: [warps, keys, dim], first all even dims."""
    ASM: gl.constexpr = _INT8_BY_TWOS if pairs.dtype == gl.int16 else _E4M3_BY_TWOS
    even, odd = gl.inline_asm_elementwise(ASM, "=&r,=&r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2)
    both = gl.permute(gl.join(even, odd), (0, 1, 3, 2))
    return gl.convert_layout(gl.reshape(both, [pairs.shape[0], pairs.shape[1], 2 * pairs.shape[2]]), pairs.type.layout)
