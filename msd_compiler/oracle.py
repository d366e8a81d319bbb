"""The source model in float32, without shortcuts: what a rewritten model is compared with.

onnxruntime's default session is no measure: it rounds the activations of a `MatMulNBits` of accuracy level 4 to int8 and
has no bfloat16 arithmetic on the CPU. The oracle computes what the graph says, with every level at 0 and every float16
and bfloat16 value as float32, and is run with graph optimizations off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, TypeProto, numpy_helper

Read = Callable[[TensorProto], np.ndarray]
"""The values of any tensor of a model, those of external ones too (`Source.array`)."""

_HALF = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})

_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "output_datatype", "softmax_precision", "stash_type"})
"""Integer attributes that name an element type, in every op of ai.onnx, ai.onnx.ml and com.microsoft that has them."""


def oracle_model(model: onnx.ModelProto, read: Read = numpy_helper.to_array) -> onnx.ModelProto:
    """A copy of a model that computes its meaning in float32.

    Every ``accuracy_level`` becomes 0, in nested graphs and functions too. float16 and bfloat16 become float32: inputs,
    outputs, intermediate values, constants (widened exactly, so -65504 and Inf stay what they are), and what ``Cast``,
    ``RandomNormal``, ``DequantizeLinear`` and their like are told to produce. Integer codes, float8, float4 and double
    stay. Feeds are widened with `widen_inputs`.

    A ``Cast`` to float16 therefore no longer rounds or saturates: the oracle is what the model approximates, not what
    half precision makes of it. Only ``BitCast`` to or from a half type has no float32 meaning; onnxruntime refuses it.

    Args:
        model: not changed. What is neither float16 nor bfloat16 is copied once; external data stays where it is.
        read: gives the values of the tensors to widen. The default finds external data in the working directory.
    """
    oracle = onnx.ModelProto()
    _copy(model, oracle, read)
    for message, field in _type_fields(oracle):
        if getattr(message, field) in _HALF:
            setattr(message, field, TensorProto.FLOAT)
    _put_levels_at_zero(oracle)
    return oracle


def levels_at_zero(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model with every ``accuracy_level`` at 0, in nested graphs and functions too, and nothing else changed."""
    exact = onnx.ModelProto()
    exact.CopyFrom(model)
    _put_levels_at_zero(exact)
    return exact


def _put_levels_at_zero(model: onnx.ModelProto) -> None:
    for node in _messages(model, NodeProto):
        for attribute in node.attribute:
            if node.domain == "com.microsoft" and attribute.name == "accuracy_level":
                attribute.CopyFrom(onnx.helper.make_attribute("accuracy_level", 0))


def is_widened(model: onnx.ModelProto) -> bool:
    """Whether anything in the model is float16 or bfloat16, so that its oracle takes widened inputs."""
    return half_precision(model) is not None


def half_precision(model: onnx.ModelProto) -> int | None:
    """The half type that the model uses, bfloat16 (the less precise) if both, None if neither."""
    used = {getattr(message, field) for message, field in _type_fields(model)}
    return next((half for half in (TensorProto.BFLOAT16, TensorProto.FLOAT16) if half in used), None)


def widen_inputs(feed: Mapping[str, Any]) -> dict[str, Any]:
    """The feed of a model as its oracle takes it: float16 and bfloat16 arrays, in sequences too, as float32."""
    return {name: _widen(value) for name, value in feed.items()}


def _widen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_widen(element) for element in value]
    # ml_dtypes.bfloat16 has no class of NumPy's own
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.name in ("float16", "bfloat16"):
        return value.astype(np.float32)
    return value


def _copy(source: Message, target: Message, read: Read) -> None:
    """Copies a message, and the half-precision tensors in it as float32, never holding those twice."""
    if isinstance(source, TensorProto):
        if source.data_type in _HALF:
            target.name, target.data_type = source.name, TensorProto.FLOAT
            target.dims.extend(source.dims)
            target.raw_data = read(source).astype("<f4").tobytes()
        else:
            target.CopyFrom(source)
        return
    for field, value in source.ListFields():
        if field.message_type is None:
            if hasattr(value, "extend"):
                getattr(target, field.name).extend(value)
            else:
                setattr(target, field.name, value)
        elif isinstance(value, Message):
            getattr(target, field.name).SetInParent()  # an empty shape is a scalar's, no shape is any
            _copy(value, getattr(target, field.name), read)
        else:
            for element in value:
                _copy(element, getattr(target, field.name).add(), read)


def _messages(root: Message, *kinds: type[Message]) -> Iterator[Any]:
    """Every message of some kinds under a message: nested graphs, functions, types within types."""
    pending = [root]
    while pending:
        message = pending.pop()
        if isinstance(message, kinds):
            yield message
        if isinstance(message, TensorProto):
            continue  # looking at its fields would copy its data
        for field, value in message.ListFields():
            if field.message_type is not None:
                pending.extend([value] if isinstance(value, Message) else value)


def _type_fields(model: onnx.ModelProto) -> Iterator[tuple[Any, str]]:
    """Every place that names an element type, as a message and the name of its field."""
    for message in _messages(model, TensorProto, TypeProto.Tensor, TypeProto.SparseTensor):
        yield message, "data_type" if isinstance(message, TensorProto) else "elem_type"
    of_function = _type_attributes_of_functions(model)
    for node in _messages(model, NodeProto):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.INT and _names_type(node, attribute.name, of_function):
                yield attribute, "i"
    for function in model.functions:
        for attribute in function.attribute_proto:
            if attribute.type == AttributeProto.INT and attribute.name in of_function[_key(function)]:
                yield attribute, "i"


def _names_type(node: NodeProto, attribute: str, of_function: dict[tuple[str, str], set[str]]) -> bool:
    called = of_function.get((node.domain, node.op_type))
    if called is not None:
        return attribute in called
    if node.op_type == "BitCast":
        return False
    return attribute in _TYPE_ATTRIBUTES or (node.op_type == "QuantizeLinear" and attribute == "precision")


def _type_attributes_of_functions(model: onnx.ModelProto) -> dict[tuple[str, str], set[str]]:
    """Per function its attributes that end as a type in its body, through calls of other functions too."""
    found: dict[tuple[str, str], set[str]] = {_key(function): set() for function in model.functions}
    before = -1
    while before != (before := sum(map(len, found.values()))):
        for function in model.functions:
            for node in _messages(function, NodeProto):
                found[_key(function)].update(
                    attribute.ref_attr_name
                    for attribute in node.attribute
                    if attribute.ref_attr_name and _names_type(node, attribute.name, found)
                )
    return found


def _key(function: FunctionProto) -> tuple[str, str]:
    return function.domain, function.name
