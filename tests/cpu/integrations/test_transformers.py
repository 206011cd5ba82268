"""Models of transformers by flashtile and by their own eager attention: the same tokens, logits and gradients."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: an extra, from Python 3.11 on, which the oldest environment leaves out")

import flashtile.integrations.transformers as integration
from flashtile.errors import ShapeError, UnsupportedError
from flashtile.integrations.key_spans import key_spans
from flashtile.testing.tiny_models import FAMILIES, WINDOW, make_model, randomise

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 8
LOGITS = {"atol": 2e-4, "rtol": 1e-4}  # float32 through two layers with large weights


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    integration.register()
    integration.register()  # twice does no harm


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_model("llama")


def prompts(padding: str = "none", batch: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """(batch, length) token ids, and their mask: rows of unlike lengths, padded on a side."""
    ids = torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((5, 0, 1)):
        if padding == "left":
            mask[row, :pads] = 0
        elif padding == "right":
            mask[row, length - pads :] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


def by_both(model: Any, run: Any) -> tuple[Any, Any]:
    """``run(model)`` by eager and by flashtile."""
    results = []
    for name in ("eager", "flashtile"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        results.append(run(model))
    return results[0], results[1]


def greedy(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True, disable_compile=True, **more
    )


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_tokens_are_those_of_eager(model: Any, cache: str, padding: str) -> None:
    """Prompts and answers are longer than the window."""
    assert TOKENS + 11 > 2 * WINDOW
    more = {"cache_implementation": cache} if cache == "static" else {}
    expected, got = by_both(model, lambda m: greedy(m, prompts(padding), **more))
    assert torch.equal(got.sequences, expected.sequences)
    for step, (mine, theirs) in enumerate(zip(got.logits, expected.logits)):
        torch.testing.assert_close(mine, theirs, **LOGITS, msg=lambda text, step=step: f"step {step}: {text}")


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_seen_by_no_token(model: Any, padding: str) -> None:
    inputs = prompts(padding)
    expected, got = by_both(model, lambda m: m(**inputs, use_cache=False).logits)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], **LOGITS)


@torch.no_grad()
def test_tokens_after_padding_on_the_right_see_no_gap(llama: Any) -> None:
    """A step after a prompt that was padded on the right: its keys lie in two pieces."""
    inputs = prompts("right")
    longer = torch.cat([inputs["attention_mask"], torch.ones((3, 1), dtype=torch.int64)], dim=1)
    positions = inputs["attention_mask"].sum(dim=1, keepdim=True)

    def two_steps(model: Any) -> torch.Tensor:
        cache = model(**inputs).past_key_values
        step: torch.Tensor = model(
            torch.tensor([[3], [4], [5]]), attention_mask=longer, position_ids=positions, past_key_values=cache
        ).logits
        return step

    expected, got = by_both(llama, two_steps)
    torch.testing.assert_close(got, expected, **LOGITS)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_several_tokens_after_a_prompt(model: Any, cache: str, padding: str) -> None:
    """A prompt in two parts, and a few tokens at once, as speculative decoding checks them."""
    import transformers

    inputs = prompts(padding, length=14)
    if padding == "none":
        del inputs["attention_mask"]

    def in_parts(model: Any) -> torch.Tensor:
        own = {"max_cache_len": 24} if cache == "StaticCache" else {}
        past = getattr(transformers, cache)(config=model.config, **own)
        logits = []
        for first, last in ((0, 7), (7, 12), (12, 14)):
            mask = {"attention_mask": inputs["attention_mask"][:, :last]} if padding == "left" else {}
            logits.append(model(inputs["input_ids"][:, first:last], past_key_values=past, **mask).logits)
        return torch.cat(logits, dim=1)

    expected, got = by_both(model, in_parts)
    real = inputs["attention_mask"].bool() if padding == "left" else torch.ones((3, 14), dtype=torch.bool)
    torch.testing.assert_close(got[real], expected[real], **LOGITS)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_gradients_are_those_of_eager(model: Any, padding: str) -> None:
    inputs = prompts(padding)
    real = inputs["attention_mask"].bool()
    guessed = real & torch.nn.functional.pad(real[:, :-1], (1, 0))  # a first token would be guessed from padding
    labels = inputs["input_ids"].masked_fill(~guessed, -100)

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected, got = by_both(model, gradients)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q"])
def test_packed_sequences_do_not_see_each_other(model: Any, how: str) -> None:
    """One row of three sequences: by its positions as with eager (GPT-OSS does not look at them), by its starts as each alone."""
    ids = prompts(batch=1, length=21)["input_ids"]
    pieces = (9, 1, 11)
    packing: dict[str, Any] = {"position_ids": torch.cat([torch.arange(piece) for piece in pieces])[None]}
    if how == "cu_seq_lens_q":
        starts = torch.tensor([0, 9, 10, 21])
        packing |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 11, "max_length_k": 11}

    def packed_or_alone(model: Any) -> torch.Tensor:
        if how == "position_ids" or model.config._attn_implementation == "flashtile":
            packed: torch.Tensor = model(ids, use_cache=False, **packing).logits
            return packed
        return torch.cat([model(piece, use_cache=False).logits for piece in ids.split(pieces, dim=1)], dim=1)

    expected, got = by_both(model, packed_or_alone)
    torch.testing.assert_close(got, expected, **LOGITS)
    got.sum().backward()  # gradients flow through packed rows, too


def test_a_model_that_sees_both_ways(llama: Any) -> None:
    both_ways = make_model("llama", is_causal=False)
    expected, got = by_both(both_ways, lambda m: m(**prompts("left"), use_cache=False).logits)
    real = prompts("left")["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], **LOGITS)
    assert not torch.allclose(got[1], llama(**prompts("left")).logits[1], **LOGITS), "the model is causal after all"


@torch.no_grad()
def test_autocast(llama: Any) -> None:
    def logits(model: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            past = model(**prompts()).past_key_values
            step: torch.Tensor = model(torch.tensor([[3], [4], [5]]), past_key_values=past).logits
        return step

    expected, got = by_both(llama, logits)
    assert got.dtype == expected.dtype and (got - expected).norm() < 0.05 * expected.norm()


def test_an_encoder_and_a_decoder() -> None:
    """Attention that sees both ways, over itself and over another sequence, by several beams."""
    import transformers

    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "vocab_size": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    model: Any = transformers.BartForConditionalGeneration(transformers.BartConfig(**heads, **sizes, **tokens)).eval()
    randomise(model, seed=0)
    expected, got = by_both(model, lambda m: m.generate(**prompts("right"), max_new_tokens=TOKENS, num_beams=2, do_sample=False))
    assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_an_encoder_with_windows(padding: str) -> None:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    windows = {"local_attention": 6, "global_attn_every_n_layers": 2}
    config = transformers.ModernBertConfig(
        **sizes, **windows, pad_token_id=0, cls_token_id=1, sep_token_id=2, eos_token_id=2, bos_token_id=1
    )
    model = transformers.ModernBertModel(config).eval()
    randomise(model, seed=0)
    expected, got = by_both(model, lambda m: m(**prompts(padding)).last_hidden_state)
    real = prompts(padding)["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], **LOGITS)


def test_dropout_in_training_follows_the_seed(llama: Any) -> None:
    model = make_model("llama", "flashtile", attention_dropout=0.5).train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**prompts("left"), use_cache=False).logits)
    assert torch.equal(losses[0], losses[1])
    assert not torch.allclose(losses[0], losses[2])


def test_compiled_training_is_the_same() -> None:
    """By the graph compiler's front end alone."""
    model = make_model("mistral", "flashtile", num_hidden_layers=1)
    inputs = prompts("left")
    expected = model(**inputs, use_cache=False).logits
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager")(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], **LOGITS)


def test_compiled_generation_over_a_static_cache(llama: Any) -> None:
    """Steps are one graph, made once: lengths stay tensors."""
    import transformers

    padding = "left"
    llama.set_attn_implementation("flashtile")
    expected = llama.generate(**prompts(padding), max_new_tokens=TOKENS, do_sample=False)
    compiled = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = llama.generate(
            **prompts(padding), max_new_tokens=TOKENS, do_sample=False, cache_implementation="static", compile_config=compiled
        )
    assert torch.equal(got, expected)


def test_a_padded_single_query_has_a_gradient(llama: Any) -> None:
    inputs = prompts("left")

    def gradient(model: Any) -> torch.Tensor:
        model.zero_grad()
        with torch.no_grad():
            past = model(**inputs).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        model(torch.tensor([[3], [4], [5]]), attention_mask=mask, past_key_values=past).logits.square().sum().backward()
        found: torch.Tensor = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
        return found

    expected, got = by_both(llama, gradient)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)


def test_what_a_pass_asks_for() -> None:
    """The smallest answer that says it all; see the module's docstring for the kinds."""
    from transformers import masking_utils

    def ask(q_length: int, kv_length: int, rows: Any = None, **more: Any) -> tuple[int, ...] | None:
        mask = None if rows is None else torch.tensor(rows, dtype=torch.bool)
        more = {"q_offset": kv_length - q_length, "mask_function": masking_utils.causal_mask_function, **more}
        answer = key_spans(2, q_length, kv_length, attention_mask=mask, **more)
        assert answer is None or answer.dtype == torch.int32
        return None if answer is None else tuple(answer.shape)

    left, both, gap = [[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 1]] * 2, [[1, 0, 1, 1], [1, 1, 1, 1]]
    assert ask(4, 4) is None and ask(2, 4) is None
    assert ask(4, 4, both) is None, "a mask without padding is none"
    assert ask(4, 4, left) == (1, 1, 4, 7), "padding, queries and padding of each row"
    assert ask(4, 9, q_offset=0) == (1, 1, 4, 3), "a static cache that is not full"
    assert ask(1, 4) == ask(1, 4, both) == (1, 1, 1, 2)
    assert ask(1, 4, left) == (1, 1, 2, 2)
    assert ask(1, 4, gap) == ask(1, 4, left, use_vmap=True) == (2, 1, 1, 6)
    assert ask(4, 4, left, allow_is_bidirectional_skip=True, mask_function=masking_utils.bidirectional_mask_function) == (1, 1, 4, 3)


def test_masks_that_are_no_band_are_refused(llama: Any) -> None:
    llama.set_attn_implementation("flashtile")
    ids = prompts()["input_ids"]
    with pytest.raises(UnsupportedError, match="mask of queries x keys"):
        llama(ids, attention_mask=torch.zeros(3, 1, 11, 11))
    gaps = torch.ones_like(ids)
    gaps[:, 4] = 0
    with pytest.raises(UnsupportedError, match="gaps between its keys"):
        llama(ids, attention_mask=gaps)
    with pytest.raises(ShapeError, match="batch of one row"):
        llama(ids, cu_seq_lens_q=torch.tensor([0, 33]), cu_seq_lens_k=torch.tensor([0, 33]))
    with pytest.warns(UserWarning, match="attention weights are never computed"):
        llama(ids, output_attentions=True)


def test_importing_the_module_does_not_import_transformers() -> None:
    """It may be imported where transformers is not installed; only `register` needs that."""
    body = ast.parse(Path(integration.__file__).read_text()).body
    imported = [ast.unparse(part) for part in body if isinstance(part, (ast.Import, ast.ImportFrom))]
    assert imported and not [line for line in imported if line.split()[1].startswith("transformers")]
