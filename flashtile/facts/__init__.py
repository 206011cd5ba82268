"""A call's facts as one tuple: the key under which a checked, planned and bound call is found again.

Equal keys mean that the checks and the plan of the call's Problem come out alike. So everything that can make a call
invalid is in the key, or makes the key None, and None sends the call through the checks. Lengths enter in buckets and
strides as their alignment, so that a cache that grows by a token a step keeps its key, and prompts of neighbouring lengths
share one.
"""

from __future__ import annotations

from flashtile.facts.backward import backward_key
from flashtile.facts.decode import decode_key, rounded_hint
from flashtile.facts.features import Key
from flashtile.facts.forward import forward_key

__all__ = ["Key", "backward_key", "decode_key", "forward_key", "rounded_hint"]
