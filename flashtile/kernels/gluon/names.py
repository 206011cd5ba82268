"""What Gluon renames between Triton versions: the one place that asks which version this is."""

from triton.experimental.gluon import language as gl

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""All threads of a program meet (``thread_barrier`` in Triton 3.6, ``barrier`` from 3.7 on)."""
