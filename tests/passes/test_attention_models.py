"""Attention in what exporters write: every one has its row, and what is said of it gives the model's own numbers."""

from collections import Counter
from fnmatch import fnmatch

import pytest
from attention_facts import assert_facts, linked_of
from msd_compiler.passes import ATTENTION_READERS
from real_models import files

from msd_compiler.attention import AttentionSite
from msd_compiler.reader import find_sites
from msd_compiler.runtime import RuntimeRefused, open_model

OPS = frozenset(
    {
        *("Attention", "MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention", "QAttention"),
        *("DecoderMaskedSelfAttention", "PagedAttention", "SparseAttention", "PackedMultiHeadAttention"),
    }
)

LLAMA, SMALL, GPT2 = (2, 4, 2, 32), (5, 8, 4, 8), (2, 4, 4, 32)

SITES = (
    # path, sites with their heads, key heads and head size; the first that fits holds
    ("*/gpt2_w8a8_*", "attention_form", 2),
    ("*/gpt2_*", GPT2, None),
    ("*/llama_gqa_*", LLAMA, None),
    ("*/qwen2_*", LLAMA, None),
    ("*/stories260k_w8a8_*", "attention_form", 5),
    ("*/stories260k_*", SMALL, None),
    ("*/bert_*", "no_cache", 2),
    ("*/minilm_*", "no_cache", 6),
    ("repo/*tiny-random-gpt2*", "attention_form", 5),
    ("repo/*tiny_gpt2_beamsearch*", "attention_form", 5),
    ("repo/ort_attention_past_state*", "attention_form", 1),
    ("repo/ort_dmmha_self_attn*", "attention_form", 1),
    ("repo/*gpt2_past_mask_one_layer*", "attention_form", 1),
    ("repo/*gpt2_one_layer*", "no_cache", 1),
    ("repo/ortpy_gpt2_past*", "attention_form", 12),
    ("repo/optimum_tinybert*", "no_cache", 2),
    ("repo/ort_bert_toy*", "no_cache", 5),
    ("repo/*attention_int32_mask*", "no_cache", 1),
    ("repo/*decoder_attention_with_past*", {"attention_form": 1, "no_cache": 1}, None),
    ("repo/ortpy_*attention*", "no_cache", 1),
    ("repo/*", {}, None),
)


def counted(linked):
    """Attention as a person counts it: its ops, and each softmax whose result is multiplied by an activation."""
    found = 0
    for scope, _, node in linked.nodes():
        if node.op in OPS:
            found += 1
        elif node.op == "Softmax":
            reached, pending = set(), [node]
            while pending:
                for reader in pending.pop().outputs[0].outputs:
                    if id(reader) in reached:
                        continue
                    reached.add(id(reader))
                    if reader.op in ("MatMul", "QLinearMatMul"):
                        found += scope.constant(reader.inputs[-1]) is None or reader.op != "MatMul"
                        pending.clear()
                        break
                    if reader.op in ("Where", "Cast", "Identity", "QuantizeLinear", "DequantizeLinear", "Dropout"):
                        pending.append(reader)
    return found


@pytest.mark.parametrize(("path", "name"), list(files()))
def test_every_attention_has_one_row(path, name):
    linked = linked_of(path)
    sites = find_sites(linked, ATTENTION_READERS, ())
    assert len({id(site.node) for site in sites}) == len(sites) == counted(linked)
    taken = [s.found for s in sites if isinstance(s.found, AttentionSite)]
    kept = Counter(str(s.found.code) for s in sites if not isinstance(s.found, AttentionSite))
    if name.startswith("nodes/"):
        assert len(sites) == ("_attention_" in name)
        return
    expected, count = next((what, n) for pattern, what, n in SITES if fnmatch(name, pattern))
    if isinstance(expected, tuple):
        assert [(f.heads, f.kv_heads, f.head_size) for f in taken] == [expected[1:]] * expected[0]
        assert not kept
    else:
        assert kept == (expected if count is None else {expected: count})
        assert not taken


@pytest.mark.parametrize(("path", "name"), list(files()))
def test_facts_give_the_models_own_numbers(path, name):
    linked = linked_of(path)
    sites = find_sites(linked, ATTENTION_READERS, ())
    if not any(isinstance(s.found, AttentionSite) and s.found.rotary is None for s in sites):
        pytest.skip("no attention to compute again")
    try:
        open_model(linked.source.proto, linked.source.folder, name=name, portable=True, log_severity_level=4)
    except RuntimeRefused as error:
        pytest.skip(str(error)[:200])
    assert_facts(linked, sites)
