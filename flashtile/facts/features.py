"""Facts that the keys of all operations have."""

from __future__ import annotations

import torch

Key = tuple[object, ...]


def vector_facts(vector: torch.Tensor | None, device: torch.device) -> Key | None:
    """A tensor of a value for each head; raises ValueError where it can have no key."""
    if vector is None:
        return None
    if vector.device != device or vector.is_neg():
        raise ValueError("a vector on another device, or of which memory holds the negatives, has no key")
    return (vector.shape, vector.dtype, vector.stride(-1))


def scale_facts(k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, device: torch.device) -> Key | None:
    """What is known of a quantised cache's scales, None without any; raises ValueError where they can have no key."""
    if k_scale is None and v_scale is None:
        return None
    facts: Key = ()
    for scale in (k_scale, v_scale):
        if scale is not None and (scale.device != device or scale.is_neg()):
            raise ValueError("a scale on another device, or of which memory holds the negatives, has no key")
        facts += (None,) if scale is None else (scale.shape, scale.dtype)
    return facts


def window_facts(window: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """The two sides; raises ValueError or TypeError unless each is an int or None."""
    left, right = window
    if (left is not None and left.__class__ is not int) or (right is not None and right.__class__ is not int):
        raise ValueError("a window of anything but ints has no key")
    return left, right


def out_has_a_key(out: torch.Tensor, shape_q: torch.Size, head_dim_v: int, device: torch.device) -> bool:
    wanted = shape_q if shape_q[-1] == head_dim_v else (*shape_q[:-1], head_dim_v)
    return out.shape == wanted and out.device == device and 0 not in out.stride()
