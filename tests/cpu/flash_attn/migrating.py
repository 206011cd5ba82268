"""The page docs/migrating.md, made of FlashAttention's signatures and of what is known of each argument; its tests hold it.

After a change here or of a signature, regenerate the page:

    python tests/cpu/flash_attn/migrating.py > docs/migrating.md
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

PAGE = Path(__file__).resolve().parents[3] / "docs" / "migrating.md"


def sibling(name: str) -> ModuleType:
    """A module beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(name)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


signatures = sibling("signatures")
TWO, THREE = "flashtile.flash_attn.flash_attn_interface", "flashtile.flash_attn_interface"
PADDING, ROTARY = "flashtile.flash_attn.bert_padding", "flashtile.flash_attn.layers.rotary"


@dataclass(frozen=True)
class Note:
    """What becomes of one argument, and the test that shows it."""

    supported: Literal["yes", "no", "hint"]
    difference: str
    held_by: str


@dataclass(frozen=True)
class Group:
    """Functions whose arguments mean the same, and a note on each of them."""

    title: str
    module: str
    functions: tuple[str, ...]
    returns: str
    notes: dict[str, Note]

    def arguments(self) -> dict[str, str]:
        """Each argument of any of the functions with its default, in order; a dash where it has none."""
        found: dict[str, str] = {}
        for name in self.functions:
            for argument, default in signatures.arguments(signatures.SIGNATURES[self.module][name]).items():
                found.setdefault(argument, default)
        return found


def yes(held_by: str, difference: str = "") -> Note:
    return Note("yes", difference, held_by)


def no(held_by: str, difference: str) -> Note:
    return Note("no", difference, held_by)


DENSE, VARLEN, BELOW, CACHE = "test_dense.py", "test_varlen.py", "test_private.py", "test_kvcache.py"
APPENDED, PACKED_APPEND = "test_appended.py::test_parity", "test_appended.py::test_packed_queries_and_keys"
PARITY = f"{DENSE}::test_parity"
ANY_LAYOUT = (
    "float32 too. A last dimension that is not contiguous is copied, as there; a head dim that is no multiple of 8 is padded, as there."
)
CACHE_LAYOUT = (
    "Any strides with a contiguous last dimension. A head dim that is no multiple of 8 is padded, which copies the cache at every call."
)
WINDOW = "-1 is unbounded, as there; so is None for a side. A tensor is read."
DETERMINISTIC = "True is obeyed. False leaves it to `torch.use_deterministic_algorithms`; out never varies."
HINT = "Accepted; changes no result: the planner lays rows out."
CHUNKS = "Refused unless 0: no kernel has a mask of chunks."
MARGIN = "Refused unless 0: no kernel leaves SMs free on request."
NO_MARGIN = "Accepted; no SMs are left free."
SCALES = "Refused: no kernel has a float8 q."
NEW_KEYS = (
    "Of the caches' dtype, or floating beside a cache of codes. New keys beyond the capacity, and on pages outside the cache, are dropped."
)
TABLES = "Of any floating dtype. A token beyond the tables is not turned. Only beside `k` and `v`, as there."
LEFT = "Refused: keys begin where the sequence does."
DESCALES = "Of a float8 or int8 cache beside a q of 16 bits; one number, (nheads_k,) or (batch, nheads_k)."
STARTS = {
    "cu_seqlens_q": yes(f"{VARLEN}::test_parity"),
    "cu_seqlens_k": yes(f"{VARLEN}::test_parity", "With `block_table` its differences are lengths, as there."),
    "max_seqlen_q": yes(
        f"{VARLEN}::test_parity",
        "Has to be right, as there; what `seqused_q` leaves out counts. A tensor is read, which waits for the device.",
    ),
    "max_seqlen_k": yes(f"{VARLEN}::test_parity", "A hint without gradients; has to be right with them. A tensor is read."),
}
SCORES = {
    "softmax_scale": yes(f"{DENSE}::test_packed_tensors_are_the_same_call"),
    "causal": yes(PARITY, "Bottom-right aligned, as there."),
    "window_size": yes(PARITY, WINDOW),
    "softcap": yes(PARITY, "Beside dropout too."),
}
TRAINING = {
    **{name: yes(PARITY, ANY_LAYOUT) for name in ("q", "k", "v")},
    **{name: yes(f"{DENSE}::test_packed_tensors_are_the_same_call", "As q, k and v.") for name in ("kv", "qkv")},
    **STARTS,
    "cu_seqlens": yes(f"{VARLEN}::test_packed_tensors_are_the_same_call"),
    "max_seqlen": yes(f"{VARLEN}::test_packed_tensors_are_the_same_call"),
    **SCORES,
    "deterministic": yes(f"{DENSE}::test_packed_tensors_are_the_same_call", DETERMINISTIC),
}
CACHES = {
    "q": yes(f"{CACHE}::test_parity", "float32 too. No gradient, as there."),
    **{name: yes(f"{CACHE}::test_parity", CACHE_LAYOUT) for name in ("k_cache", "v_cache")},
    **{name: yes(APPENDED, NEW_KEYS) for name in ("k", "v")},
    **{name: yes(APPENDED, TABLES) for name in ("rotary_cos", "rotary_sin")},
    "cache_seqlens": yes(f"{CACHE}::test_parity", "Lengths beyond the capacity are clamped."),
    "cache_batch_idx": yes(f"{CACHE}::test_parity", "An index outside the cache makes its keys invisible."),
    "cache_leftpad": yes(APPENDED, "Beside pages too. Many queries over a padded cache are `decode`'s, which is slower for them."),
    **{name: yes(f"{CACHE}::test_parity", "Any page size.") for name in ("block_table", "page_table")},
    **{name: yes(f"{CACHE}::test_parity", note.difference) for name, note in SCORES.items()},
    "rotary_interleaved": yes(APPENDED),
    "alibi_slopes": yes(f"{CACHE}::test_parity"),
    "num_splits": yes(f"{CACHE}::test_parity", "0 leaves it to the planner, which may share keys among programs unevenly."),
    "return_softmax_lse": yes(f"{CACHE}::test_parity"),
}
REFUSED_BY_THREE = {
    "qv": no(f"{DENSE}::test_what_has_no_counterpart_is_refused", "Refused: no kernel has a second query for values."),
    **{name: no(f"{DENSE}::test_what_has_no_counterpart_is_refused", SCALES) for name in ("q_descale", "k_descale", "v_descale")},
    "attention_chunk": no(f"{DENSE}::test_what_has_no_counterpart_is_refused", CHUNKS),
    "sm_margin": no(f"{DENSE}::test_what_has_no_counterpart_is_refused", MARGIN),
}
REFUSED_BY_CACHES = {
    name: no(f"{CACHE}::test_what_the_third_generation_alone_has_is_refused", REFUSED_BY_THREE[name].difference)
    for name in ("qv", "q_descale", "attention_chunk")
}
BELOW_IT = f"{BELOW}::test_dense_functions_are_the_public_one_in_two_halves"
PACKED_BELOW = f"{BELOW}::test_packed_functions_are_the_public_one_in_two_halves"
AHEAD = f"{CACHE}::test_plans_made_ahead_are_obeyed"
KNOWN_AHEAD = f"{CACHE}::test_plans_know_splits_and_pages"
PADDED_AHEAD = "test_appended.py::test_plans_know_left_padding"
REFUSED_AHEAD = f"{CACHE}::test_plans_refuse_what_calls_refuse"

GROUPS = (
    Group(
        "Training and prefill, FlashAttention-2",
        TWO,
        tuple(name for name in signatures.SIGNATURES[TWO] if name.endswith("_func")),
        "`out`; with `return_attn_probs`, `(out, softmax_lse, None)`. `softmax_lse` is +inf where a query sees no key, as there, and has a "
        "gradient, which there is dropped in silence. The third is None: the probabilities after dropout, which FlashAttention returns for "
        "its tests, are never made.",
        {
            **TRAINING,
            "dropout_p": yes(
                f"{DENSE}::test_dropout_keeps_the_share_that_it_should_and_its_gradient_knows_which",
                "The entries that a seed of torch's drops are others than there. Not of keys in pages.",
            ),
            "alibi_slopes": yes(PARITY, "A gradient is refused; there it is None."),
            "return_attn_probs": yes(PARITY, "The third result is None."),
            "block_table": yes(f"{VARLEN}::test_pages", "Any page size. There are no gradients, as there: to ask for one raises."),
        },
    ),
    Group(
        "A key-value cache, FlashAttention-2",
        TWO,
        ("flash_attn_with_kvcache",),
        "`out`; with `return_softmax_lse`, `(out, softmax_lse)`, +inf where a query sees no key, as there.",
        CACHES,
    ),
    Group(
        "Below the public functions, FlashAttention-2",
        TWO,
        tuple(name for name in signatures.SIGNATURES[TWO] if name.startswith("_flash")),
        "Forward: `(out, softmax_lse, None, rng_state)`, where `rng_state` is None without dropout. Backward: None, where there it is "
        "scratch. They break a graph of `torch.compile`. `_get_block_size_n(device, head_dim, is_dropout, is_causal)` is the number of "
        "keys a step in the planner's own plan.",
        {
            **{name: yes(BELOW_IT, "Head dims are multiples of 8, as there.") for name in ("q", "k", "v")},
            **{name: yes(BELOW_IT, "As the forward function returned it, or merged.") for name in ("out", "softmax_lse")},
            "dout": yes(BELOW_IT),
            **{name: yes(BELOW_IT, "Written where given; parts of a larger tensor too.") for name in ("dq", "dk", "dv")},
            **{name: yes(PACKED_BELOW, note.difference) for name, note in STARTS.items()},
            **{name: yes(BELOW_IT) for name in ("dropout_p", "softmax_scale", "causal", "softcap", "alibi_slopes")},
            **{name: yes(PACKED_BELOW, "-1 is unbounded.") for name in ("window_size_left", "window_size_right")},
            "return_softmax": Note("hint", "Accepted; the probabilities are never made.", BELOW_IT),
            "block_table": yes(f"{BELOW}::test_pages_and_used_lengths", "Any page size."),
            "leftpad_k": no(f"{BELOW}::test_what_does_not_fit_is_refused", LEFT),
            "seqused_k": yes(f"{BELOW}::test_pages_and_used_lengths"),
            "zero_tensors": Note("hint", "Accepted; every row is written anyway.", PACKED_BELOW),
            "num_splits": no(f"{BELOW}::test_what_does_not_fit_is_refused", "Refused unless 0 or 1."),
            "deterministic": yes(BELOW_IT, DETERMINISTIC),
            "rng_state": yes(BELOW_IT, "Required with dropout."),
        },
    ),
    Group(
        "Training and prefill, FlashAttention-3",
        THREE,
        tuple(name for name in signatures.SIGNATURES[THREE] if name.endswith("_func")),
        "`out`; with `return_attn_probs`, `(out, softmax_lse)`: -inf where a query sees no key, +inf where there is none, as there.",
        {
            **TRAINING,
            "v": yes(f"{DENSE}::test_values_of_another_width", ANY_LAYOUT + " Its head dim may be another, to 256."),
            "seqused_q": yes(
                f"{VARLEN}::test_used_lengths", "Rows that are not used get out 0, lse -inf and gradient 0; there they are not written."
            ),
            "seqused_k": yes(f"{VARLEN}::test_used_lengths"),
            **REFUSED_BY_THREE,
            "num_splits": no(f"{DENSE}::test_what_has_no_counterpart_is_refused", "Refused unless 0 or 1."),
            "pack_gqa": Note("hint", HINT, f"{DENSE}::test_hints_change_no_result"),
            "num_heads_q": yes(f"{DENSE}::test_heads_beside_each_other_in_one_tensor"),
            "return_attn_probs": yes(f"{DENSE}::test_parity_of_the_third_generation"),
        },
    ),
    Group(
        "A key-value cache, FlashAttention-3",
        THREE,
        ("flash_attn_with_kvcache",),
        "`out`; with `return_softmax_lse`, `(out, softmax_lse, None, None)`: the last two, partial results, are not kept.",
        {
            **CACHES,
            **REFUSED_BY_CACHES,
            "cu_seqlens_q": yes(f"{CACHE}::test_packed_queries"),
            "cu_seqlens_k_new": yes(PACKED_APPEND),
            "rotary_seqlens": yes(PACKED_APPEND),
            **{name: yes("test_appended.py::test_descales_are_those_of_the_cache", DESCALES) for name in ("k_descale", "v_descale")},
            "sm_margin": Note("hint", NO_MARGIN, "test_appended.py::test_plans_know_left_padding"),
            "max_seqlen_q": yes(f"{CACHE}::test_packed_queries", "Required with `cu_seqlens_q`."),
            "scheduler_metadata": yes(AHEAD, "A plan: that of `get_scheduler_metadata`, or any of flashtile's. It is obeyed or refused."),
            "pack_gqa": Note("hint", HINT, f"{DENSE}::test_hints_change_no_result"),
        },
    ),
    Group(
        "Plans ahead, FlashAttention-3",
        THREE,
        ("get_scheduler_metadata",),
        "A `DecodePlan` or `ForwardPlan`, where there it is a tensor. It depends on shapes alone, and waits for nothing.",
        {
            **{name: yes(AHEAD) for name in ("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "causal")},
            "headdim": yes(KNOWN_AHEAD, "Rounded up to a multiple of 8, as the call pads it."),
            "headdim_v": yes(KNOWN_AHEAD, "Rounded up to a multiple of 8, as the call pads it."),
            "cache_seqlens": yes(AHEAD, "Only says on which device."),
            "qkv_dtype": yes(AHEAD),
            "cu_seqlens_q": yes(AHEAD, "Only says that queries are packed."),
            "page_size": yes(KNOWN_AHEAD),
            "has_softcap": yes(KNOWN_AHEAD),
            "num_splits": yes(KNOWN_AHEAD),
            "window_size": yes(AHEAD, WINDOW),
            "pack_gqa": Note("hint", HINT, AHEAD),
            **{
                name: Note("hint", "`max_seqlen_k` counts new keys too.", PADDED_AHEAD) for name in ("cu_seqlens_k_new", "max_seqlen_k_new")
            },
            "cache_leftpad": yes(PADDED_AHEAD, "Only says that there is padding."),
            "attention_chunk": no(REFUSED_AHEAD, CHUNKS),
            "sm_margin": Note("hint", NO_MARGIN, PADDED_AHEAD),
        },
    ),
    Group(
        "Merging parts, FlashAttention-3",
        THREE,
        ("flash_attn_combine",),
        "`(out, softmax_lse)`, as there. `flashtile.merge` takes packed parts too, and has gradients.",
        {
            **{name: yes(f"{CACHE}::test_combine", "Other floating dtypes too.") for name in ("out_partial", "lse_partial")},
            "out": yes(f"{CACHE}::test_combine"),
            "out_dtype": yes(f"{CACHE}::test_combine"),
        },
    ),
    Group(
        "Padding",
        PADDING,
        tuple(signatures.SIGNATURES[PADDING]),
        "As there: five results of `unpad_input`, four of `unpad_input_for_concatenated_sequences`. `index_first_axis`, "
        "`index_put_first_axis` and `index_first_axis_residual` are here as well.",
        {
            "hidden_states": yes("test_padding.py::test_there_and_back"),
            "attention_mask": yes("test_padding.py::test_there_and_back"),
            "unused_mask": yes("test_padding.py::test_unused_tokens_are_packed_but_not_counted_as_used"),
            "attention_mask_in_length": yes("test_padding.py::test_short_sequences_in_one_row"),
            **{name: yes("test_padding.py::test_there_and_back") for name in ("indices", "batch", "seqlen")},
        },
    ),
    Group(
        "Rotary embeddings",
        ROTARY,
        tuple(signatures.SIGNATURES[ROTARY]),
        "A tensor like x, or the packed one itself. Twice differentiable; there once. `apply_rotary_emb_func` and `apply_rotary_emb_torch` "
        "are here as well.",
        {
            "x": yes("test_rotary.py::test_dense"),
            **{
                name: yes("test_rotary.py::test_within_packed_tensors", "Written in place, under torch's rule for leaves.")
                for name in ("qkv", "kv")
            },
            **{name: yes("test_rotary.py::test_within_packed_tensors") for name in ("cos_k", "sin_k", "num_heads_q")},
            **{
                name: yes("test_rotary.py::test_dense", "float32 beside 16-bit x too. A gradient is refused; there it is None.")
                for name in ("cos", "sin")
            },
            "interleaved": yes("test_rotary.py::test_dense"),
            "inplace": yes("test_rotary.py::test_gradients", "torch refuses a leaf that requires a gradient, as for any change in place."),
            "seqlen_offsets": yes("test_rotary.py::test_dense", "Tokens beyond the tables stay as they are, with an int too."),
            "cu_seqlens": yes(
                "test_rotary.py::test_packed_is_each_sequence_by_itself", "Tokens of no sequence are copied; there they are not written."
            ),
            "max_seqlen": yes("test_rotary.py::test_packed_is_each_sequence_by_itself"),
        },
    ),
)

INTRODUCTION = """# From FlashAttention

Code that was written for `flash_attn` runs by a change of its imports: put `flashtile.` before the module's name.

```python
from flashtile.flash_attn import flash_attn_func, flash_attn_varlen_func  # FlashAttention-2
from flashtile.flash_attn.bert_padding import pad_input, unpad_input
from flashtile.flash_attn.layers.rotary import apply_rotary_emb
from flashtile.flash_attn_interface import flash_attn_with_kvcache  # FlashAttention-3
```

Code that cannot be changed finds modules of the names `flash_attn`, `flash_attn_interface` and `flash_attn_3` in the repository's folder
`compat`, once that is on `PYTHONPATH`. It is not installed, so that it never stands in the way of the real ones. Some libraries ask which
distribution is installed rather than which module can be imported, and those will not find it.

The functions are thin: `flashtile.attention`, `flashtile.attention_varlen`, `flashtile.append_kv`, `flashtile.decode` and
`flashtile.merge` do the work, and their [contracts](contracts.md) hold. So in all of them

- tensors may lie on a CPU, and on any GPU that a kernel runs on; float32 is taken beside float16 and bfloat16;
- head dims go to 256, and those that are no multiples of 8 are padded with zeros, and cut again;
- a wrong argument raises one of [flashtile's errors](contracts.md#errors), which are `ValueError`, `TypeError` and `NotImplementedError`
  too, where FlashAttention raises `RuntimeError`;
- `torch.compile` sees each call as one operator;
- within `torch.autocast`, q, k and v are cast where one is float32 or their dtypes differ; FlashAttention refuses such tensors;
- an argument that has no counterpart is refused with `UnsupportedError` where it is given. None is ignored, but for hints that cannot
  change a result.

`ring_flash_attn` 0.1.8 (its ring, zigzag, stripe, packed and llama3 forms, two processes on a CPU) ran unchanged with `compat` on
`PYTHONPATH`, and so did samples of FlashAttention's own tests, on a CPU and without dropout.

The signatures are those of FlashAttention 2.8, and of FlashAttention-3's beta. In the tables, *yes* is supported, *hint* is accepted and
changes nothing, *no* is refused where it is given; then what differs from FlashAttention, and the test under `tests/cpu/flash_attn` that
shows it.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for group in GROUPS:
        parts += [f"## {group.title}\n", ", ".join(f"`{name}`" for name in group.functions) + ".\n", f"Returns {group.returns}\n"]
        rows = ["| argument | default | supported | what differs | shown by |", "|---|---|---|---|---|"]
        for name, default in group.arguments().items():
            note = group.notes[name]
            shown = f"`{default}`" if default else "–"
            test = note.held_by.partition("::")[2]
            rows.append(f"| `{name}` | {shown} | {note.supported} | {note.difference} | `{test}` |")
        parts.append("\n".join(rows) + "\n")
    parts.append("This page is made by `tests/cpu/flash_attn/migrating.py`.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
