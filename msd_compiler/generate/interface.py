"""What a decoder model takes and gives: token ids, masks, positions, caches and logits, found by role, name and shape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import helper

from ..errors import ModelError
from ..inputs.graph import SAME_NUMBERS, Value, attribute, index_model, uses_of
from ..inputs.roles import Role
from ..inputs.signature import Input, Signature, read_signature

CACHE_TYPES = frozenset(
    np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int16, np.int32, np.int64)
)
_FILLED = frozenset(
    {Role.TYPES, Role.SEQLENS, Role.TOTAL_LENGTH, Role.PAST_LENGTH, Role.USE_CACHE, Role.ONE, Role.ZERO}
)
_LOGITS = re.compile(r"logits|lm_head")
_PAST = re.compile(r"(past|present)(_key_values?)?")
_SHARING = frozenset({"GroupQueryAttention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention"})
_ORT_NAMES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Cache:
    """An input that the next step takes from an output of this one: keys, values, their scales, or a state."""

    past: Input
    """Its ``dims`` are sizes, "@batch", or "@past" where it grows."""
    present: str

    @property
    def grows(self) -> bool:
        """Whether it holds something of every token; a state does not."""
        return "@past" in self.past.dims


@dataclass(frozen=True)
class Interface:
    """How to feed a decoder."""

    ids: Input
    """``[B, n]`` int32 or int64."""
    mask: Input | None
    """``[B, past + n]``, 1 for tokens to see."""
    positions: Input | None
    """``[n]``, ``[B, n]`` or ``[?, B, n]``."""
    others: Signature
    """Inputs that follow from the lengths alone."""
    caches: tuple[Cache, ...]
    logits: str
    """Name of the output ``[B, n, V]``."""
    no_padding: str | None
    """Why prompts of different length cannot be padded; None if they can."""
    no_buffer: str | None
    """Why caches cannot be buffers of fixed capacity; None if they can, as far as is known."""
    needs_buffer: bool
    """Whether they must be."""


def read_interface(session: onnxruntime.InferenceSession, model: Any | None = None) -> Interface:
    """Find the inputs and outputs of a decoder.

    Args:
        session: of the model.
        model: the same model as an `onnx.ModelProto`; the data of its large tensors is not read and may be missing. None: what
            only the graph tells is not known, so no prompt can be padded.

    Raises:
        ModelError: it is no decoder of tokens; says what is missing.
    """
    graph = _bare(session) if model is None else model
    signature = read_signature(graph)
    if signature.unsupported:
        name, kind = next(iter(signature.unsupported.items()))
        raise _no_decoder(f"input {name!r} is {kind}, not a tensor of numbers")
    by_role: dict[Role, list[Input]] = {}
    for i in signature.inputs:
        by_role.setdefault(i.role, []).append(i)
    ids = _only(by_role, Role.IDS, (2,), "token ids [batch, tokens]")
    if ids is None:
        raise _no_decoder(f"none of its inputs takes token ids; they are {_names(i.name for i in signature.inputs)}")
    mask = _only(by_role, Role.MASK, (2,), "a mask [batch, past and new tokens]")
    positions = _only(by_role, Role.POSITIONS, (1, 2, 3), "positions [batch, tokens]")
    outputs = {o.name: o for o in session.get_outputs()}
    caches = tuple(_cache(i, list(outputs)) for i in by_role.get(Role.CACHE, ()))
    fed = [ids, mask, positions, *(c.past for c in caches)]
    others = [i for i in signature.inputs if i not in fed]
    for i in others:
        if i.role not in _FILLED:
            raise _no_decoder(f"what its input {i.name!r} [{', '.join(map(str, i.declared))}] needs is not known")
    shares, appends = _cache_styles(graph)
    return Interface(
        ids,
        mask,
        positions,
        replace(signature, inputs=tuple(others)),
        caches,
        _logits([o for name, o in outputs.items() if name not in {c.present for c in caches}], bool(caches)),
        _no_padding(graph, mask, positions, by_role) if model is not None else "only the model's file tells whether",
        _no_buffer(caches, shares, appends) if model is not None or not caches else None,
        writes_into_buffers(graph),
    )


def writes_into_buffers(model: Any) -> bool:
    """Whether the model's caches must be buffers of fixed capacity: its ``msd.Attention`` says so."""
    return "msd.Attention" in _cache_styles(model)[0]


def _no_decoder(why: str) -> ModelError:
    return ModelError(f"the model is no decoder that can generate: {why}")


def _names(names: Iterator[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _only(by_role: dict[Role, list[Input]], role: Role, ranks: tuple[int, ...], what: str) -> Input | None:
    found = by_role.get(role, [])
    if not found:
        return None
    if len(found) > 1:
        raise _no_decoder(f"{_names(i.name for i in found)} all look like {what}, and one is needed")
    if len(found[0].dims) not in ranks:
        raise _no_decoder(f"input {found[0].name!r} [{', '.join(map(str, found[0].declared))}] is not {what}")
    return found[0]


def _cache(past: Input, outputs: list[str]) -> Cache:
    """Pair a cache with the output of the same layer and kind.

    ``past_key_values.3.key_scale`` and ``present.3.key_scale``, ``past_3`` and ``present_3``, ``past_3_0`` and ``present_3_0``.
    """
    kind = _kind(past.name)
    found = [name for name in outputs if kind is not None and _kind(name) == kind]
    if len(found) != 1:
        raise _no_decoder(
            f"cache {past.name!r} needs one output with the same layer and kind, as 'present.0.key' is to "
            f"'past_key_values.0.key', and has {_names(iter(found))}"
        )
    if past.dtype not in CACHE_TYPES:
        raise _no_decoder(f"cache {past.name!r} is {past.dtype}; known are {', '.join(sorted(map(str, CACHE_TYPES)))}")
    dims = tuple("@past" if d in ("@buffer", "@total") else 1 if d == "@one" else d for d in past.dims)
    open_axes = [d for d in dims if isinstance(d, str) and d not in ("@batch", "@past")]
    if open_axes and not (past.head_sizes and open_axes == [dims[-1]]):
        raise _no_decoder(f"cache {past.name!r} is [{', '.join(map(str, past.declared))}], of unknown size")
    return Cache(replace(past, dims=dims), found[0])


def _kind(name: str) -> str | None:
    """``3.key`` of ``past_key_values.3.key``, what a cache's two names share; None for other names."""
    lower = name.lower()
    return _PAST.sub("", lower, count=1).strip("._/") if _PAST.search(lower) else None


def _logits(outputs: list[Any], cached: bool) -> str:
    """The output that is no cache, called logits if there are several or the model has no cache."""
    named = [o for o in outputs if _LOGITS.search(o.name.lower())]
    chosen = named or (outputs if cached else [])
    if len(chosen) != 1 or len(chosen[0].shape) not in (0, 3) or "float" not in chosen[0].type:
        shown = ", ".join(f"{o.name!r} {list(o.shape)}" for o in outputs) or "none"
        raise _no_decoder(f"it needs one output 'logits' [batch, tokens, vocabulary] besides caches; there are {shown}")
    return str(chosen[0].name)


def _no_padding(graph: Any, mask: Input | None, positions: Input | None, roles: dict[Role, list[Input]]) -> str | None:
    missing = [name for name, i in (("attention_mask", mask), ("position_ids", positions)) if i is None]
    if mask is None or missing:
        return f"the model has no {' and no '.join(missing)}"
    if positions is not None and len(positions.dims) == 1:
        return f"all rows share the positions {positions.name!r}"
    if Role.SEQLENS in roles:
        return f"the model counts a row's tokens from its start ({roles[Role.SEQLENS][0].name!r})"
    for use in uses_of(Value(index_model(graph), mask.name), SAME_NUMBERS):
        if use.node.op_type in ("ReduceSum", *_SHARING):
            return f"the model only counts the ones of {mask.name!r} ({use.node.op_type} {use.node.name!r})"
    return None


def _cache_styles(graph: Any) -> tuple[set[str], set[str]]:
    """The ops that write into a buffer they are given, and those that make a longer cache."""
    shares: set[str] = set()
    appends: set[str] = set()
    for node in graph.graph.node:
        if node.op_type in _SHARING:
            shares.add(node.op_type)
        elif (node.domain, node.op_type) == ("msd", "Attention"):
            kind = attribute(node, "cache", b"append")
            kind = kind.decode() if isinstance(kind, bytes) else kind
            if kind == "grow":  # as GroupQueryAttention: either way
                shares.add("msd.Attention, growing")
            else:
                (shares if kind == "shared" else appends).add("msd.Attention")
    return shares, appends


def _no_buffer(caches: tuple[Cache, ...], shares: set[str], appends: set[str]) -> str | None:
    if not caches:
        return "the model has no cache"
    if appends or not shares:
        return "no op of the model writes into a buffer it is given: caches grow"
    return None


def _bare(session: onnxruntime.InferenceSession) -> onnx.ModelProto:
    """A session's inputs and outputs as a model without nodes."""

    def infos(values: Any) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(v.name, _element_type(v), v.shape) for v in values]

    return helper.make_model(helper.make_graph([], "g", infos(session.get_inputs()), infos(session.get_outputs())))


def _element_type(value: Any) -> int:
    name = re.sub(r"^tensor\((.*)\)$", r"\1", value.type)
    name = _ORT_NAMES.get(name, name)
    try:
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(getattr(ml_dtypes, name, None) or name)))
    except (KeyError, TypeError, ValueError) as error:
        raise _no_decoder(f"{value.name!r} is {value.type}, not a tensor of numbers") from error
