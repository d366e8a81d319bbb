"""Writing the nodes that replace a site."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from .edit import Edit


class NodeBuilder:
    """Collects new nodes, names their outputs after the site, and spells ops for the model's opset."""

    def __init__(self, edit: Edit, site: str):
        self._edit = edit
        self._site = site
        self.nodes: list[onnx.NodeProto] = []

    @property
    def opset(self) -> int:
        """Default-domain opset of the model."""
        return self._edit.opset

    def constant(self, what: str, value: np.ndarray) -> str:
        """An initializer with this value."""
        return self._edit.constant(f"{self._site}/msd.{what}", value)

    def node(self, op: str, *inputs: str, domain: str = "", name: str = "", **attributes: object) -> str:
        """Add a node of one output; the output's name is returned."""
        return self.node_of(1, op, *inputs, domain=domain, name=name, **attributes)[0]

    def node_of(
        self, count: int, op: str, *inputs: str, domain: str = "", name: str = "", **attributes: object
    ) -> list[str]:
        """Add a node of several outputs; their names are returned."""
        outputs = [self._edit.unique(f"{self._site}/msd.{op}") for _ in range(count)]
        self.nodes.append(
            helper.make_node(op, inputs, outputs, name=name or outputs[0], domain=domain or None, **attributes)
        )
        return outputs

    def rename_last(self, name: str) -> None:
        """Give the last node's output a name of the model's own: that of an output."""
        self.nodes[-1].output[0] = name

    def reduce_max(self, x: str, axis: int) -> str:
        """ReduceMax over one axis, kept, whose axes are an attribute below opset 18."""
        if self.opset < 18:
            return self.node("ReduceMax", x, axes=[axis], keepdims=1)
        return self.node("ReduceMax", x, self.constant("axes", np.array([axis], np.int64)), keepdims=1)

    def unsqueeze(self, x: str, axes: list[int]) -> str:
        """Unsqueeze, whose axes are an attribute below opset 13."""
        if not axes:
            return x
        if self.opset < 13:
            return self.node("Unsqueeze", x, axes=axes)
        return self.node("Unsqueeze", x, self.constant("axes", np.array(axes, np.int64)))

    def split(self, x: str, sizes: list[int], axis: int) -> list[str]:
        """Split, whose sizes are an attribute below opset 13."""
        if self.opset < 13:
            return self.node_of(len(sizes), "Split", x, axis=axis, split=sizes)
        return self.node_of(len(sizes), "Split", x, self.constant("sizes", np.array(sizes, np.int64)), axis=axis)

    def dimension(self, x: str, axis: int) -> str:
        """``[1]`` int64: the size of one dimension."""
        return self.node("Gather", self.node("Shape", x), self.constant("axis", np.array([axis], np.int64)))

    def transpose_last_two(self, x: str, rank: int) -> str:
        """Exchange the last two dimensions of a tensor of rank ``rank``."""
        return self.node("Transpose", x, perm=[*range(rank - 2), rank - 1, rank - 2])

    def finish(self, y: str) -> list[onnx.NodeProto]:
        """The nodes, the last one's output being ``y``."""
        self.nodes[-1].output[0] = y
        return self.nodes
