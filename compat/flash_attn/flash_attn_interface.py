"""flash_attn.flash_attn_interface by flashtile."""

from flashtile.flash_attn.flash_attn_interface import *  # noqa: F403

USE_TRITON_ROCM = False  # FlashAttention's switch to its own Triton kernels
