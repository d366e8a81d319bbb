"""A stack of quantized linear layers of any size, built from a seed: what large models are tried on.

``python models/large.py -o FOLDER --gigabytes 4`` writes ``large.onnx`` and its weights beside it, a layer at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx
from onnx import TensorProto, helper

from msd_compiler.bench.spellings import DataFile, random_scales

FILE = "large.onnx"
DATA = "large.data"
OPSET = 21
IR_VERSION = 10
BLOCK = 32

Format = Literal["int8", "int4"]
"""How weights are stored: ``DequantizeLinear -> MatMul`` per channel, or ``MatMulNBits`` in blocks of 32."""


@dataclass(frozen=True)
class Parameters:
    """What the model is made of: layers ``hidden -> intermediate -> hidden -> ...`` until there are bytes enough."""

    gigabytes: float = 4.0
    """10**9 bytes of weights, or little more."""
    seed: int = 0
    format: Format = "int8"
    hidden: int = 4096
    intermediate: int = 11008


def layer_sizes(parameters: Parameters) -> Iterator[tuple[int, int]]:
    """K and N of each layer; there are two at least, and the last one gives ``hidden`` columns."""
    sizes = parameters.hidden, parameters.intermediate
    each = sizes[0] * sizes[1] // (1 if parameters.format == "int8" else 2)
    for _ in range(max(1, -int(-parameters.gigabytes * 1e9 // (2 * each)))):
        yield sizes
        yield sizes[::-1]


def write(folder: Path, parameters: Parameters) -> Path:
    """Write the model; no more than one layer is in memory.

    The input ``x`` is float32 ``[rows, hidden]``. Weights have mean 0 and variance 1/K, so that ``y``, of the same
    shape, is about as large as ``x`` however many layers there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = np.random.RandomState(parameters.seed)  # NumPy's frozen generator: the same bytes on every machine
    nodes: list[onnx.NodeProto] = []
    stored: list[TensorProto] = []
    x = "x"
    with DataFile(folder / DATA) as data:
        for number, (k, n) in enumerate(layer_sizes(parameters)):
            y = f"layers.{number}.y"
            if parameters.format == "int8":
                codes = data.add(f"layers.{number}.weight", TensorProto.INT8, (k, n), source.bytes(k * n))
                scales = data.add_floats(f"layers.{number}.scales", random_scales(source, k, 256, n))
                w = f"layers.{number}.dequantized"
                nodes.append(helper.make_node("DequantizeLinear", [codes.name, scales.name], [w], w, axis=1))
                nodes.append(helper.make_node("MatMul", [x, w], [y], f"layers.{number}.matmul"))
            else:
                blocks = -(-k // BLOCK)
                shape = n, blocks, BLOCK // 2
                content = source.bytes(n * blocks * BLOCK // 2)
                codes = data.add(f"layers.{number}.weight", TensorProto.UINT8, shape, content)
                scales = data.add_floats(f"layers.{number}.scales", random_scales(source, k, 16, n, blocks))
                nodes.append(
                    helper.make_node(
                        "MatMulNBits",
                        [x, codes.name, scales.name],
                        [y],
                        f"layers.{number}.matmul",
                        domain="com.microsoft",
                        K=k,
                        N=n,
                        bits=4,
                        block_size=BLOCK,
                    )
                )
            stored += [codes, scales]
            x = y
    nodes[-1].output[0] = "y"
    shape_of_both = ["rows", parameters.hidden]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_of_both)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_of_both)],
        stored,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    (folder / FILE).write_bytes(model.SerializeToString(deterministic=True))
    return folder / FILE


def main() -> None:
    """Write the model that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the model and its weights")
    parser.add_argument("--gigabytes", type=float, default=Parameters.gigabytes)
    parser.add_argument("--seed", type=int, default=Parameters.seed)
    parser.add_argument("--format", choices=get_args(Format), default=Parameters.format)
    arguments = parser.parse_args()
    parameters = Parameters(arguments.gigabytes, arguments.seed, arguments.format)
    print(write(arguments.output, parameters))


if __name__ == "__main__":
    main()
