"""Language models of transformers with random weights: small enough that a test generates with each in a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

WINDOW = 8
_SIZES: Mapping[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_BY_TURNS: Mapping[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# What each has beside grouped heads: the configuration's class in transformers, and its own arguments.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", {**_BY_TURNS, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", {**_BY_TURNS, "query_pre_attn_scalar": 16}),
    "gpt_oss": ("GptOssConfig", {**_BY_TURNS, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def make_model(family: str, attention: str = "eager", seed: int = 0, **changes: Any) -> Any:
    """A model of one of FAMILIES in eval mode, `randomise`d; ``changes`` are to its configuration."""
    import transformers

    name, own = FAMILIES[family]
    config = getattr(transformers, name)(**{**_SIZES, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights so large that greedy tokens vary, and that sinks and logits matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "sinks" in name:
            parameter.normal_(std=1.0 if "sinks" in name else 0.3, generator=generator)
