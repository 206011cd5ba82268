"""Device functions with one meaning each, shared by all kernels."""
