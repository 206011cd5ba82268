"""The portable kernel's shapes of both passes, with the registers that they took when compiled.

For each family (a matrix instruction, or what stands in for one) and pass, the shapes of each head dim in order of preference.
Compiled with Triton 3.7, causal, with four query heads a key head; none of them spills but those that say so. With Triton 3.6 they take
up to 50 registers more beside packed rows, and three spill 4 to 8 bytes there. Beside dropout, which was compiled for sm_90 alone, one
spills 8 bytes (head dim 64, over keys), and with every other feature too up to 120. FMA is the vector units where there is no instruction.
"""

from __future__ import annotations

from typing import NamedTuple

FMA = "fma"
WIDE_FMA = "wide fma"  # operands of four bytes, by asynchronous copies
WIDE = "wide"  # before an instruction's name: operands of four bytes
DROPPED = "dropped"  # before an instruction's name: dropout beside softcap, ALiBi, a window or packed rows
UNALIGNED = "unaligned"  # no asynchronous copy can bring operands, so that threads load them one by one
SPILLS = 999


class Shape(NamedTuple):
    """Rows owned, rows a step, warps, ring stages; registers a thread, and with softcap, ALiBi, a window, packed rows, dropout or small
    copies.

    ``spilled``: bytes that a thread spills without these, the most of both Tritons, full and causal. The shape is here because it
    measured faster, spills and all, than any that spills nothing; what was not measured spills nothing.
    """

    owned: int
    step: int
    num_warps: int
    num_stages: int
    registers: int
    shaped: int
    spilled: int = 0


Shapes = dict[int, tuple[Shape, ...]]  # by head dim; one between takes those of the next larger one


def _of(*shapes: tuple[int, ...]) -> tuple[Shape, ...]:
    return tuple(Shape(*shape) for shape in shapes)


_WGMMA: dict[str, Shapes] = {
    "keys": {
        # on an H200: 64 keys and three stages 1.06x of two (1024 keys, causal)
        64: _of((128, 64, 8, 2, 240, 250), (64, 64, 4, 3, 255, SPILLS, 24), (64, 64, 4, 2, 235, 244)),
        96: _of((128, 32, 8, 2, 232, 242)),
        # on an H200: 64 keys 1.25x of 128 (1024 and 4096 keys, causal), 1.11x and 1.07x (full)
        128: _of((128, 32, 8, 2, 241, 248), (64, 64, 4, 2, 255, SPILLS, 204)),
        192: _of((64, 32, 8, 2, 236, 255)),
        256: _of((64, 16, 8, 2, 255, SPILLS), (32, 32, 8, 2, 160, 208), (32, 16, 8, 2, 168, 170)),
    },
    "queries": {
        64: _of((128, 64, 8, 2, 152, 205), (64, 64, 4, 3, 163, 248)),
        96: _of((128, 64, 8, 2, 185, 240), (64, 64, 4, 2, 186, SPILLS), (64, 32, 4, 2, 186, 229)),
        128: _of((128, 64, 8, 2, 200, 245), (128, 32, 8, 2, 156, 200), (64, 64, 4, 2, 208, SPILLS), (64, 32, 4, 2, 159, 207)),
        192: _of((128, 64, 8, 2, 232, SPILLS), (128, 32, 8, 2, 214, 248), (64, 32, 4, 2, 252, SPILLS)),
        256: _of((128, 32, 8, 2, 222, 254), (64, 32, 8, 2, 214, 240)),
    },
}
_TCGEN05: dict[str, Shapes] = {
    "keys": {
        64: _of((128, 64, 8, 2, 254, SPILLS), (128, 32, 8, 2, 200, 230)),
        128: _of((128, 32, 8, 2, 200, 230)),
        256: _of((64, 32, 8, 2, 204, 230)),
    },
    "queries": {
        64: _of((128, 64, 8, 2, 148, 255)),
        128: _of((128, 64, 8, 2, 182, 254)),
        256: _of((64, 32, 8, 2, 128, 180)),
    },
}
_MMA_SYNC: dict[str, Shapes] = {
    "keys": {
        64: _of((128, 32, 8, 2, 184, 255), (64, 32, 4, 2, 180, 255)),
        96: _of((128, 16, 8, 2, 220, 239)),
        128: _of((128, 16, 8, 2, 242, 245), (64, 16, 4, 2, 226, 243)),
        192: _of((32, 32, 8, 2, 214, 225), (32, 16, 4, 2, 215, 230)),
        256: _of((64, 16, 8, 2, 252, SPILLS), (32, 32, 8, 2, 204, 214), (32, 16, 8, 2, 196, 210)),
    },
    "queries": {
        64: _of((128, 64, 8, 2, 185, 241), (64, 64, 4, 2, 181, SPILLS), (64, 32, 4, 2, 168, 190)),
        96: _of((128, 64, 8, 2, 255, SPILLS), (128, 32, 8, 2, 218, 230), (64, 32, 4, 2, 187, 255)),
        128: _of((128, 32, 8, 2, 198, 245), (64, 32, 4, 2, 200, 215)),
        192: _of((128, 16, 8, 2, 242, 252), (64, 16, 4, 2, 240, 255)),
        256: _of((128, 16, 8, 2, 238, 250), (64, 16, 8, 2, 206, 239), (32, 32, 4, 2, 168, 190)),
    },
}
_MFMA: dict[str, Shapes] = {
    "keys": {
        64: _of((64, 64, 4, 1, 338, 396), (64, 32, 4, 2, 258, 300)),
        128: _of((64, 32, 4, 1, 280, 304)),
        256: _of((32, 16, 4, 1, 224, 240)),
    },
    "queries": {
        64: _of((128, 64, 8, 1, 200, SPILLS), (128, 32, 8, 1, 199, 256)),
        128: _of((128, 32, 8, 1, 199, 256), (64, 32, 4, 1, 220, 260)),
        256: _of((64, 16, 4, 1, 196, 230)),
    },
}
_WIDE: dict[str, Shapes] = {
    "keys": {
        64: _of((64, 32, 4, 2, 255, SPILLS), (32, 16, 8, 2, 250, 252)),
        128: _of((32, 16, 8, 2, 176, 214)),
        256: _of((32, 16, 8, 2, 174, 215), (16, 16, 8, 2, 180, 215)),
    },
    "queries": {
        64: _of((64, 32, 4, 2, 175, 255)),
        128: _of((64, 16, 4, 2, 197, 229), (32, 16, 8, 2, 128, 168)),
        256: _of((32, 16, 8, 2, 128, 150), (16, 16, 8, 2, 128, 150)),
    },
}
_WIDE_MFMA: dict[str, Shapes] = {
    "keys": {64: _of((32, 32, 4, 1, 268, 316)), 128: _of((32, 16, 4, 1, 220, 260)), 256: _of((16, 16, 2, 1, 370, 400))},
    "queries": {128: _of((32, 16, 4, 1, 190, 230)), 256: _of((16, 16, 2, 1, 364, 400))},
}
_FMA: dict[str, Shapes] = {
    "keys": {
        64: _of((16, 16, 8, 1, 172, 178)),
        128: _of((16, 16, 8, 1, 238, 245)),
    },
    "queries": {
        64: _of((64, 16, 8, 1, 230, SPILLS), (32, 16, 8, 1, 200, 255)),
        128: _of((16, 16, 8, 1, 150, 182)),
        256: _of((16, 16, 8, 1, 255, SPILLS)),
    },
}
_WIDE_FMA: dict[str, Shapes] = {
    "keys": {
        64: _of((32, 32, 8, 2, 108, 130)),
        128: _of((64, 16, 8, 2, 162, SPILLS), (32, 16, 8, 2, 112, 130)),
        256: _of((32, 16, 8, 2, 147, 165), (16, 16, 8, 2, 80, 110)),
    },
    "queries": {
        64: _of((64, 32, 8, 2, 107, 130)),
        128: _of((64, 32, 8, 2, 128, SPILLS), (32, 16, 8, 2, 78, 110)),
        256: _of((32, 16, 8, 2, 106, 130), (16, 16, 8, 2, 80, 110)),
    },
}
_UNALIGNED: dict[str, Shapes] = {
    "keys": {
        64: _of((64, 16, 8, 2, 255, SPILLS), (32, 16, 8, 2, 233, 233)),
        128: _of((32, 16, 8, 2, 254, SPILLS), (16, 16, 8, 1, 178, 178)),
        256: _of((16, 16, 8, 1, 237, 254)),
    },
    "queries": {
        64: _of((64, 16, 8, 2, 166, 230)),
        128: _of((32, 16, 8, 2, 169, 255)),
        256: _of((16, 16, 8, 1, 178, 255)),
    },
}
# Where dropout comes beside other features: those of the shapes above that then spill have made room for smaller ones.
_DROPPED_WGMMA: dict[str, Shapes] = {
    "keys": {
        64: _of((128, 64, 8, 2, 255, 255)),
        96: _of((128, 32, 8, 2, 255, 255)),
        128: _of((64, 32, 8, 2, 254, 254)),
        256: _of((32, 32, 8, 2, 208, 208)),
    },
    "queries": {
        64: _of((128, 64, 8, 2, 205, 205)),
        128: _of((128, 64, 8, 2, 245, 245)),
        256: _of((128, 32, 8, 2, 254, 254)),
    },
}
_DROPPED_TCGEN05: dict[str, Shapes] = {
    "keys": {128: _of((128, 32, 8, 2, 239, 239)), 256: _TCGEN05["keys"][256]},
    "queries": {128: _of((128, 32, 8, 2, 201, 201)), 256: _TCGEN05["queries"][256]},
}
SHAPES: dict[str, dict[str, Shapes]] = {
    "wgmma": _WGMMA, "tcgen05.mma": _TCGEN05, "mma.sync": _MMA_SYNC, "mfma": _MFMA, "wmma": _MMA_SYNC,
    "wide wgmma": _WIDE, "wide tcgen05.mma": _WIDE, "wide mma.sync": _WIDE, "wide mfma": _WIDE_MFMA, "wide wmma": _WIDE,
    f"{DROPPED} wgmma": _DROPPED_WGMMA, f"{DROPPED} tcgen05.mma": _DROPPED_TCGEN05,
    FMA: _FMA, WIDE_FMA: _WIDE_FMA, UNALIGNED: _UNALIGNED,
}  # fmt: skip


def shapes_of(family: str, owner: str, head_dim: int) -> tuple[Shape, ...]:
    """The shapes of a pass for heads of ``head_dim``, best first; none where none is known."""
    known = SHAPES[family][owner]
    return next((shapes for dim, shapes in known.items() if dim >= head_dim), ())
