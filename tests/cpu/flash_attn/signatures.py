"""The signatures of FlashAttention 2.8's functions and of FlashAttention-3's, without annotations: what the drop-in has to have."""

from __future__ import annotations

import inspect

_TWO = "flashtile.flash_attn.flash_attn_interface"
_THREE = "flashtile.flash_attn_interface"
_SCORES = "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None"
_TRAINING = f"dropout_p=0.0, {_SCORES}, deterministic=False, return_attn_probs=False"
_STARTS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_DESCALES = "q_descale=None, k_descale=None, v_descale=None"
_BELOW = "dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes"
_THREE_TAIL = (
    f"qv=None, {_DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_attn_probs=False"
)

SIGNATURES: dict[str, dict[str, str]] = {
    _TWO: {
        "flash_attn_func": f"q, k, v, {_TRAINING}",
        "flash_attn_kvpacked_func": f"q, kv, {_TRAINING}",
        "flash_attn_qkvpacked_func": f"qkv, {_TRAINING}",
        "flash_attn_varlen_func": f"q, k, v, {_STARTS}, {_TRAINING}, block_table=None",
        "flash_attn_varlen_kvpacked_func": f"q, kv, {_STARTS}, {_TRAINING}",
        "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_TRAINING}",
        "flash_attn_with_kvcache": (
            "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, "
            "cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
            "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
        ),
        "_get_block_size_n": "device, head_dim, is_dropout, is_causal",
        "_flash_attn_forward": f"q, k, v, {_BELOW}, return_softmax",
        "_flash_attn_varlen_forward": (
            f"q, k, v, {_STARTS}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, "
            "alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0"
        ),
        "_flash_attn_backward": f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {_BELOW}, deterministic, rng_state=None",
        "_flash_attn_varlen_backward": (
            f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {_STARTS}, {_BELOW}, deterministic, rng_state=None, zero_tensors=False"
        ),
    },
    _THREE: {
        "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, {_THREE_TAIL}",
        "flash_attn_qkvpacked_func": (
            f"qkv, softmax_scale=None, causal=False, {_DESCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
            "deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False"
        ),
        "flash_attn_varlen_func": f"q, k, v, {_STARTS}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, {_THREE_TAIL}",
        "flash_attn_with_kvcache": (
            "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
            "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, "
            f"rotary_seqlens=None, {_DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
            "rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False"
        ),
        "get_scheduler_metadata": (
            "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, qkv_dtype=torch.bfloat16, "
            "headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, "
            "causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0"
        ),
        "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    },
    "flashtile.flash_attn.bert_padding": {
        "unpad_input": "hidden_states, attention_mask, unused_mask=None",
        "unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
        "pad_input": "hidden_states, indices, batch, seqlen",
    },
    "flashtile.flash_attn.layers.rotary": {
        "apply_rotary_emb": "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None",
        "apply_rotary_emb_qkv_": ("qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None"),
        "apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    },
}


def plain(signature: inspect.Signature) -> str:
    """A signature in the form of the list above."""
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


def arguments(text: str) -> dict[str, str]:
    """Each name in a signature of the list above with its default, which is empty where it has none."""
    found, depth, current = {}, 0, ""
    for char in text + ",":
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            name, _, default = current.partition("=")
            found[name.strip()] = default
            current = ""
        else:
            current += char
    return found
