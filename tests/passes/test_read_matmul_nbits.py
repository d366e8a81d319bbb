"""com.microsoft.MatMulNBits, whatever its accuracy_level, becomes msd.MatMul and means the same."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from support import (
    HALF_TOLERANCE,
    PARSER_TYPES,
    activation,
    assert_same_numbers,
    compiled,
    declare_outputs,
    model,
    nbits_weight,
    ops,
)

from msd_compiler.errors import ModelError

K, N = 64, 20


@dataclass(frozen=True)
class Spelling:
    """A row: the weight's making, what else the node has, and the format that the report names."""

    format: str
    bits: int = 4
    block: int = 32
    zeros: str | None = None
    k: int = K
    flat: bool = False
    attributes: str = ""
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    floats: str = "float32"
    x: tuple[int, ...] = (3,)

    def feed(self):
        return {"x": activation((*self.x, self.k), self.floats)}

    def model(self, opset=17):
        tensors = nbits_weight(self.k, N, self.block, self.bits, self.zeros, floats=self.floats, flat=self.flat)
        tensors |= self.inputs
        names = ", ".join(name if name in tensors else "" for name in ("x", "b", "s", "z", "g", "c")).rstrip(", ")
        node = f"MatMulNBits<K={self.k}, N={N}, bits={self.bits}, block_size={self.block}{self.attributes}>"
        scalar = PARSER_TYPES[self.floats]
        graph = f"({scalar}[{', '.join(map(str, self.feed()['x'].shape))}] x) => ({scalar}[] y) {{ y = com.microsoft.{node}(x{names}) }}"
        return declare_outputs(model(graph, opset=opset, **tensors), self.feed())


C = activation((N,), seed=3)

# fmt: off
SPELLINGS = {
    **{f"{bits} bits{', ' + zeros if zeros else ''}": Spelling(f"{'u' if zeros else ''}int{bits} block 32{words}", bits, zeros=zeros)
       for bits in (2, 4, 8) for zeros, words in ((None, ""), ("packed", ", zero points"), ("float32", ", float zero points"))},
    **{f"{bits} bits, odd number of blocks, {zeros}": Spelling(f"uint{bits} block 16, {words}", bits, 16, zeros, 80)
       for bits in (2, 4, 8) for zeros, words in (("packed", "zero points"), ("float32", "float zero points"))},
    **{f"K = {k}, blocks of {block}": Spelling(f"uint4 block {block}, zero points", 4, block, "packed", k)
       for k, block in ((40, 16), (17, 16), (100, 32), (16, 16), (20, 32), (1, 16), (300, 128), (600, 256), (520, 512))},
    **{f"accuracy_level {level}": Spelling("int4 block 32", attributes=f", accuracy_level={level}") for level in range(5)},
    "flat scales": Spelling("int4 block 32", flat=True),
    "flat zero points": Spelling("uint4 block 16, zero points", 4, 16, "packed", 80, flat=True),
    "flat float zero points": Spelling("uint4 block 32, float zero points", zeros="float32", flat=True),
    "whole float zero points": Spelling("uint4 block 32, float zero points", inputs={"z": np.full((N, 2), 8, np.float32)}),
    "bias": Spelling("int4 block 32", inputs={"c": C}),
    "trivial g_idx": Spelling("int4 block 32", inputs={"g": np.arange(K, dtype=np.int32) // 32}),
    "g_idx and bias": Spelling("int4 block 32", inputs={"g": np.arange(K, dtype=np.int32) // 32, "c": C}),
    "vector": Spelling("int4 block 32", x=()),
    "rank 3": Spelling("int4 block 32", x=(2, 3)),
    "float16": Spelling("int4 block 32", floats="float16"),
    "float16, packed zero points": Spelling("uint4 block 32, zero points", zeros="packed", floats="float16"),
    "float16, float zero points": Spelling("uint4 block 32, float zero points", zeros="float16", floats="float16"),
    "float16, bias": Spelling("int8 block 32", 8, inputs={"c": C.astype(np.float16)}, floats="float16"),
}
# fmt: on


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_same_numbers(spelling):
    done = assert_same_numbers(spelling.model(), spelling.feed(), tolerance=HALF_TOLERANCE[spelling.floats])
    (row,) = done.report.sites
    assert (row.form, row.format, row.k, row.n) == ("MatMulNBits", spelling.format, spelling.k, N)
    assert row.m == int(np.prod(spelling.x))
    assert ops(done.model) == ["msd.MatMul"]


def test_bfloat16():
    tensors = nbits_weight(K, N, 32, floats="bfloat16")
    node = f"MatMulNBits<K={K}, N={N}, bits=4, block_size=32>"
    text = f"(float[3,64] x) => (float[3,20] y) {{ h = Cast<to=16>(x)  p = com.microsoft.{node}(h, b, s)  y = Cast<to=1>(p) }}"
    feed = {"x": activation((3, K), "bfloat16").astype(np.float32)}
    assert_same_numbers(model(text, opset=17, **tensors), feed, tolerance=HALF_TOLERANCE["bfloat16"])


def test_bias_and_add():
    tensors = nbits_weight(K, N, 32) | {"c": C, "e": -2 * C}
    node = f"MatMulNBits<K={K}, N={N}, bits=4, block_size=32>"
    text = f"(float[3,64] x) => (float[3,20] y) {{ p = com.microsoft.{node}(x, b, s, , , c)  y = Add(e, p) }}"
    done = assert_same_numbers(model(text, opset=17, **tensors), {"x": activation((3, K))})
    assert ops(done.model) == ["msd.MatMul"]


def test_missing_attributes():
    """bits defaults to 4; the others are required."""
    tensors = nbits_weight(K, N, 32)
    text = (
        f"(float[3,64] x) => (float[3,20] y) {{ y = com.microsoft.MatMulNBits<K={K}, N={N}, block_size=32>(x, b, s) }}"
    )
    assert_same_numbers(model(text, opset=17, **tensors), {"x": activation((3, K))})
    for missing in (f"K={K}, ", f"N={N}, ", ", block_size=32"):
        with pytest.raises(ModelError, match="MatMulNBits 'y' needs a weight, scales, K, N and block_size"):
            compiled(model(text.replace(missing, ""), opset=17, **tensors))


NAN = np.full((N, 2), np.nan, np.float32)
# fmt: off
ERRORS = {
    "codes": ({"b": np.zeros((N, 2, 8), np.uint8)}, "weight 'b' have shape [20, 2, 8], expected 640 elements (K=64, N=20, block_size=32, bits=4)"),
    "scales": ({"s": np.ones((N, 3), np.float32)}, "scales 's' have shape [20, 3], expected 40 elements"),
    "packed zero points": ({"z": np.zeros((N, 2), np.uint8)}, "zero points 'z' have shape [20, 2], expected 20 elements"),
    "float zero points": ({"z": np.zeros((N, 1), np.float32)}, "zero points 'z' have shape [20, 1], expected 40 elements"),
    "bias": ({"c": np.zeros(N + 1, np.float32)}, "bias 'c' has shape [21], expected [20]"),
    "NaN": ({"s": NAN}, "40 of 40 scales are NaN or Inf"),
    "Inf": ({"s": np.where(np.arange(40).reshape(N, 2) == 7, -np.inf, 1).astype(np.float32)}, "1 of 40 scales are NaN or Inf"),
    "NaN zero points": ({"z": NAN}, "40 of 40 zero points are NaN or Inf"),
    "Inf zero points": ({"z": np.where(NAN > 0, 0, np.inf).astype(np.float32)}, "40 of 40 zero points are NaN or Inf"),
}
# fmt: on


@pytest.mark.parametrize(("tensors", "words"), ERRORS.values(), ids=ERRORS)
def test_model_error(tensors, words):
    tensors = nbits_weight(K, N, 32) | tensors
    names = ", ".join(name if name in tensors else "" for name in ("z", "g", "c")).rstrip(", ")
    node = f"com.microsoft.MatMulNBits<K={K}, N={N}, bits=4, block_size=32>"
    with pytest.raises(ModelError) as error:
        compiled(
            model(f"(float[3,64] x) => (float[3,20] y) {{ [layer] y = {node}(x, b, s, {names}) }}", opset=17, **tensors)
        )
    assert words in str(error.value)
    assert "MatMulNBits 'layer'" in str(error.value)
