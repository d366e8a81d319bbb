"""The trained model as ONNX, by the exporter that users call, and the proof that both say the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache

OPSET = 18
TOLERANCE = 1e-4
"""Largest difference of a logit: sums of a few hundred float32 products in another order."""


class _WithCache(torch.nn.Module):
    """A decoder whose cache is inputs and outputs, as in every exported one."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache(config=self.model.config)
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        result = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        )
        present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return result.logits, *present


def export(model: LlamaForCausalLM, path: Path) -> float:
    """Write a model with its cache to one file; returns how far onnxruntime's numbers are from torch's.

    Raises:
        ValueError: further than ``TOLERANCE``, or what the cache leads to is not what all tokens at once do.
    """
    model.set_attn_implementation("sdpa")  # what transformers takes where nobody asks
    decoder = _WithCache(model.eval()).eval()
    arguments = _inputs(model, batch=2, tokens=3, past=5)
    layers = range(model.config.num_hidden_layers)
    kinds = [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]
    batch, past = "batch_size", "past_sequence_length"
    tokens = {0: batch, 1: "sequence_length"}
    program = torch.onnx.export(
        decoder,
        arguments,
        dynamo=True,
        opset_version=OPSET,
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{k}" for k in kinds)],
        output_names=["logits", *(f"present.{k}" for k in kinds)],
        dynamic_shapes=(tokens, {0: batch, 1: "total_sequence_length"}, tokens, ({0: batch, 2: past},) * len(kinds)),
        verbose=False,
    )
    proto = program.model_proto
    strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return _checked(decoder, path)


def strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes: where in which file each node comes from, on the machine that exported."""
    graph = model.graph
    for thing in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del thing.metadata_props[:]
        thing.doc_string = ""


def _checked(decoder: _WithCache, path: Path) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    furthest = 0.0
    for batch, tokens, past in ((1, 5, 0), (2, 3, 5), (1, 1, 40), (1, 64, 0)):
        given = _inputs(decoder.model, batch, tokens, past)
        with torch.no_grad():
            wanted = decoder(*given)
        furthest = max(furthest, *(_distance(a, b) for a, b in zip(_run(session, given), wanted, strict=True)))
    ids, mask, positions, *empty = _inputs(decoder.model, 1, 5, 0)
    whole = _run(session, (ids, mask, positions, *empty))
    first = _run(session, (ids[:, :4], mask[:, :4], positions[:, :4], *empty))
    cache = [torch.from_numpy(tensor) for tensor in first[1:]]
    second = _run(session, (ids[:, 4:], mask, positions[:, 4:], *cache))
    furthest = max(furthest, float(np.abs(second[0] - whole[0][:, 4:]).max()))
    if furthest > TOLERANCE:
        raise ValueError(f"{path.name} is {furthest:.1e} away from the model; {TOLERANCE:.0e} is allowed")
    return furthest


def _inputs(model: LlamaForCausalLM, batch: int, tokens: int, past: int) -> tuple[torch.Tensor, ...]:
    """Random tokens behind a cache of random tokens' keys and values."""
    config = model.config
    choice = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, config.vocab_size, (batch, past + tokens), generator=choice)
    cache = [torch.zeros(batch, config.num_key_value_heads, 0, config.head_dim)] * (2 * config.num_hidden_layers)
    positions = torch.arange(past + tokens)[None].repeat(batch, 1)
    mask = torch.ones_like(ids)
    if past:
        with torch.no_grad():
            _, *cache = _WithCache(model)(ids[:, :past], mask[:, :past], positions[:, :past], *cache)
    return ids[:, past:], mask, positions[:, past:], *cache


def _run(session: onnxruntime.InferenceSession, given: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})


def _distance(found: np.ndarray, wanted: torch.Tensor) -> float:
    return float(np.abs(found - wanted.numpy()).max(initial=0.0))
