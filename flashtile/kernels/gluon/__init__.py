"""Kernels in Gluon, for the GPUs whose copy engines and matrix instructions Triton's own language does not reach."""
