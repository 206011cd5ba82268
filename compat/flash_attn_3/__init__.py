"""The package name of FlashAttention-3, for programs that import it. Put ``compat`` on PYTHONPATH."""
