"""FlashAttention's ``layers``: rotary position embeddings."""
