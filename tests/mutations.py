"""What can be wrong with a model: changes to its bytes, and to its nodes, attributes, tensors, types and versions."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import onnx
from onnx import AttributeProto, TensorProto, helper

NUMBERS = (0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63))
TEXTS = ("", "x", "nothing", "a" * 5000, "ü\n\0[red]", "../up", "/", "1e999")
OPS = (
    "MatMul", "Gemm", "DequantizeLinear", "QuantizeLinear", "Clip", "MatMulNBits", "GatherBlockQuantized", "Reshape", "Transpose",
    "Cast", "Add", "Mul", "Identity", "Gather", "If", "Loop", "Constant", "MatMulInteger", "DynamicQuantizeLinear", "QMoE", "TRT_MXFP8DequantizeLinear",
)  # fmt: skip
DOMAINS = ("", "ai.onnx", "com.microsoft", "msd", "trt", "nowhere")


def _node(proto: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    return rng.choice(proto.graph.node)


def _tensor(proto: onnx.ModelProto, rng: random.Random) -> TensorProto:
    return rng.choice(proto.graph.initializer)


def _name(proto: onnx.ModelProto, rng: random.Random) -> str:
    """Of a tensor that there is, most of the time."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(TEXTS[:3])
    if kind == 1:
        return _tensor(proto, rng).name
    return rng.choice(_node(proto, rng).output)


def rewire(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    node.input[rng.randrange(len(node.input))] = _name(proto, rng)


def redirect(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(proto, rng)
    node.output[rng.randrange(len(node.output))] = _name(proto, rng)


def add_input(proto: onnx.ModelProto, rng: random.Random) -> None:
    _node(proto, rng).input.append(_name(proto, rng))


def add_output(proto: onnx.ModelProto, rng: random.Random) -> None:
    _node(proto, rng).output.append(_name(proto, rng))


def drop_input(proto: onnx.ModelProto, rng: random.Random) -> None:
    del _node(proto, rng).input[-1:]


def drop_outputs(proto: onnx.ModelProto, rng: random.Random) -> None:
    del _node(proto, rng).output[rng.choice([0, -1]) :]


def forget(proto: onnx.ModelProto, rng: random.Random) -> None:
    del proto.graph.node[rng.randrange(len(proto.graph.node))]


def repeat(proto: onnx.ModelProto, rng: random.Random) -> None:
    proto.graph.node.add().CopyFrom(_node(proto, rng))


def reorder(proto: onnx.ModelProto, rng: random.Random) -> None:
    nodes = list(proto.graph.node)
    rng.shuffle(nodes)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)


def rename_op(proto: onnx.ModelProto, rng: random.Random) -> None:
    _node(proto, rng).op_type = rng.choice(OPS)


def rename_domain(proto: onnx.ModelProto, rng: random.Random) -> None:
    _node(proto, rng).domain = rng.choice(DOMAINS)


def insert_op(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A node between another one and what it reads."""
    node = _node(proto, rng)
    position = rng.randrange(len(node.input))
    made = helper.make_node(rng.choice(OPS), [node.input[position]], [f"inserted_{rng.random()}"])
    made.input.extend(_name(proto, rng) for _ in range(rng.randrange(4)))
    node.input[position] = made.output[0]
    proto.graph.node.insert(0, made)


def reattribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    """An attribute of another value, or of another type."""
    attribute = rng.choice(_node(proto, rng).attribute)
    kind = rng.randrange(7)
    if kind == 0:
        attribute.type = rng.choice([*AttributeProto.AttributeType.values(), 99])
    elif kind == 1:
        attribute.name = rng.choice(
            ["axis", "block_size", "output_dtype", "K", "N", "bits", "to", "perm", "alpha", "value", ""]
        )
    elif kind == 2:
        attribute.s, attribute.type = rng.choice([b"", b"1", b"\xff\xfe"]), AttributeProto.STRING
    elif kind == 3:
        attribute.f, attribute.type = rng.choice([0.0, -1.5, float("inf"), float("nan")]), AttributeProto.FLOAT
    elif kind == 4:
        attribute.ints.extend(rng.choices(NUMBERS, k=rng.randrange(5)))
        attribute.type = AttributeProto.INTS
    else:
        attribute.i, attribute.type = rng.choice(NUMBERS), AttributeProto.INT


def add_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    names = [
        "axis",
        "block_size",
        "K",
        "N",
        "bits",
        "to",
        "transA",
        "transB",
        "output_dtype",
        "allowzero",
        "accuracy_level",
    ]
    with suppress(ValueError):  # a number beyond int64
        _node(proto, rng).attribute.append(helper.make_attribute(rng.choice(names), rng.choice(NUMBERS)))


def drop_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    del _node(proto, rng).attribute[-1:]


def resize(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(proto, rng)
    tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)


def rerank(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(proto, rng)
    if rng.random() < 0.5:
        tensor.dims.append(rng.choice((1, 1, *NUMBERS)))
    else:
        del tensor.dims[-1:]


def retype(proto: onnx.ModelProto, rng: random.Random) -> None:
    _tensor(proto, rng).data_type = rng.choice([*range(28), 99, -1])


def cut(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(proto, rng)
    tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]


def refill(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Other numbers in a tensor: ones, which are NaN as floats, or noise."""
    tensor = _tensor(proto, rng)
    size = len(tensor.raw_data)
    tensor.raw_data = b"\xff" * size if rng.random() < 0.5 else rng.randbytes(size)


def refield(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Numbers in the fields that are for one type each."""
    tensor = _tensor(proto, rng)
    if rng.random() < 0.5:
        tensor.ClearField("raw_data")
    tensor.int32_data.extend([-1, 300])
    tensor.float_data.append(1.0)
    tensor.string_data.append(b"text")


def rename_tensor(proto: onnx.ModelProto, rng: random.Random) -> None:
    _tensor(proto, rng).name = _name(proto, rng)


def forget_tensor(proto: onnx.ModelProto, rng: random.Random) -> None:
    del proto.graph.initializer[rng.randrange(len(proto.graph.initializer))]


def repeat_tensor(proto: onnx.ModelProto, rng: random.Random) -> None:
    proto.graph.initializer.add().CopyFrom(_tensor(proto, rng))


def externalize(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A tensor in a file beside the model, or what says where it is, changed."""
    tensor = _tensor(proto, rng)
    tensor.data_location = TensorProto.EXTERNAL
    key = rng.choice(["location", "offset", "length", "checksum", "other"])
    value = rng.choice([*TEXTS, "model.onnx", *map(str, NUMBERS)])
    if tensor.external_data and rng.random() < 0.7:
        rng.choice(tensor.external_data).value = value
    else:
        tensor.external_data.add(key="location", value="model.onnx")
        tensor.external_data.add(key=key, value=value)


def reversion(proto: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        proto.ir_version = rng.choice(NUMBERS)
    elif kind == 1:
        proto.opset_import.add(domain=rng.choice(DOMAINS), version=rng.choice(NUMBERS))
    elif kind == 2:
        del proto.opset_import[-1:]
    else:
        rng.choice(proto.opset_import).version = rng.choice([*NUMBERS, 5, 10, 11, 13, 30])


def redeclare(proto: onnx.ModelProto, rng: random.Random) -> None:
    """What the file says of an input, an output or a tensor between."""
    graph = proto.graph
    value = rng.choice([*graph.input, *graph.output, *graph.value_info])
    declared = value.type.tensor_type
    kind = rng.randrange(6)
    if kind == 0:
        declared.elem_type = rng.choice([*range(28), 99])
    elif kind == 1:
        declared.ClearField("shape")
    elif kind == 2:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == 3:
        value.name = _name(proto, rng)
    elif kind == 4:
        declared.shape.dim.add().dim_value = rng.choice(NUMBERS)
    else:
        dim = rng.choice(declared.shape.dim)
        if rng.random() < 0.3:
            dim.dim_param = rng.choice(TEXTS)
        else:
            dim.dim_value = rng.choice(NUMBERS)


def nest(proto: onnx.ModelProto, rng: random.Random) -> None:
    """The whole graph inside a node of itself."""
    inner = onnx.GraphProto()
    inner.CopyFrom(proto.graph)
    if inner.ByteSize() < 2**20:
        node = _node(proto, rng)
        node.op_type = rng.choice(["If", "Loop", "Scan", node.op_type])
        attribute = node.attribute.add(name=rng.choice(["then_branch", "body"]), type=AttributeProto.GRAPH)
        attribute.g.CopyFrom(inner)


def add_function(proto: onnx.ModelProto, rng: random.Random) -> None:
    """A function that may go by the name of an op, and may call itself."""
    node = _node(proto, rng)
    function = proto.functions.add(domain=node.domain or rng.choice(DOMAINS), name=node.op_type)
    function.input.extend(node.input)
    function.output.extend(node.output)
    function.opset_import.extend(proto.opset_import)
    function.node.add().CopyFrom(node)
    function.node.add().CopyFrom(_node(proto, rng))
    if rng.random() < 0.5:
        node.domain = function.domain


def annotate(proto: onnx.ModelProto, rng: random.Random) -> None:
    proto.metadata_props.add(
        key=rng.choice(["msd.report", "other"]), value=rng.choice(["{}", '{"version": 1}', *TEXTS])
    )


MUTATIONS: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    rewire, redirect, add_input, add_output, drop_input, drop_outputs, forget, repeat, reorder, rename_op, rename_domain, insert_op,
    reattribute, reattribute, add_attribute, drop_attribute, resize, resize, rerank, retype, cut, refill, refield, rename_tensor,
    forget_tensor, repeat_tensor, externalize, reversion, redeclare, nest, add_function, annotate,
)  # fmt: skip


def mutate(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Between one and eight mutations; those that find nothing to change do nothing."""
    for change in rng.choices(MUTATIONS, k=rng.choice([1, 1, 1, 2, 4, 8])):
        with suppress(IndexError, ValueError):
            change(proto, rng)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, left out, repeated or cut off, most of them near the beginning or end, where structure is."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if not changed:
            break
        at = min(int(rng.expovariate(1 / 3000)), len(changed) - 1)
        at = at if rng.random() < 0.5 else len(changed) - 1 - at
        kind = rng.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.choice([0, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            changed[at:at] = changed[at : at + rng.randrange(1, 200)]
        elif kind == 4:
            changed[at : at + 8] = rng.randbytes(8)
        elif rng.random() < 0.1:
            del changed[at:]
    return bytes(changed)
