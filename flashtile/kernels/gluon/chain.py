"""Kernels of one call, each of which takes its place on the device while the last one's programs end there (dependent launch)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def begin_after_last(PDL: gl.constexpr):
    """Waits until all that the last kernel wrote can be read, and lets the next one come once every program is here.

    Every program of every kernel of a chain calls this (the first one need not wait), or does both by itself: so a kernel has ended
    only if all before it have. Before the call a program may do what rests on nothing in memory.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
