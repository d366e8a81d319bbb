"""What becomes of a cache's dimensions on the way to a product: transposed, repeated for groups of heads, merged and split."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from .attention_logits import named, not_followed
from .shape_values import ShapeValues

BATCH, HEADS, GROUP, TOKENS, COLUMNS = "batch", "heads", "group", "tokens", "columns"

Axis = tuple[str, ...]
"""What a dimension holds, slowest first: ``(heads, group)`` where each head of the cache is there once per query head; () for 1."""

CACHE: tuple[Axis, ...] = ((BATCH,), (HEADS,), (TOKENS,), (COLUMNS,))
TRANSPOSED: tuple[Axis, ...] = ((BATCH,), (HEADS,), (COLUMNS,), (TOKENS,))

MOVES = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand"})
"""Ops that change dimensions only."""


class Layout:
    """The dimensions of a tensor that holds a cache, node by node.

    Args:
        dims: of the cache, ``[B, Hkv, T, D]``.
    """

    def __init__(self, dims: Sequence[int | None], values: ShapeValues):
        self.axes: list[Axis] = list(CACHE)
        self._sizes: dict[str, int | None] = dict(zip((BATCH, HEADS, TOKENS, COLUMNS), dims, strict=True))
        self._values = values

    @property
    def group(self) -> int | None:
        """How often each head is repeated, None if unknown; 1 where none is."""
        return self._sizes.get(GROUP) if any(GROUP in axis for axis in self.axes) else 1

    def is_as(self, wanted: Sequence[Axis]) -> bool:
        """Whether the dimensions are those, heads perhaps repeated."""
        return [tuple(a for a in axis if a != GROUP) for axis in self.axes] == list(wanted) and all(
            GROUP not in axis or axis == (HEADS, GROUP) for axis in self.axes
        )

    def follow(self, node: gs.Node) -> None:
        """Take one of `MOVES` into account.

        Raises:
            Reject: it does something to a cache that attention does not.
        """
        rule = {
            "Transpose": self._transpose,
            "Unsqueeze": self._unsqueeze,
            "Squeeze": self._squeeze,
            "Expand": self._expand,
            "Reshape": self._reshape,
        }[node.op]
        if not rule(node):
            raise not_followed(
                f"{named(node)} between its cache and its product is not followed: it neither exchanges tokens and "
                "columns nor repeats heads"
            )

    def _size(self, axis: Axis) -> int | None:
        """How long a dimension is."""
        size = 1
        for part in axis:
            length = self._sizes.get(part)
            if length is None:
                return None
            size *= length
        return size

    def _transpose(self, node: gs.Node) -> bool:
        perm = node.attrs.get("perm", range(len(self.axes))[::-1])
        if sorted(perm) != list(range(len(self.axes))):
            return False
        self.axes = [self.axes[p] for p in perm]
        return True

    def _listed(self, node: gs.Node) -> list[int] | None:
        """Axes of Unsqueeze and Squeeze: an attribute, or an input since opset 13."""
        if "axes" in node.attrs:
            return [int(a) for a in node.attrs["axes"]]
        value = self._values.value(node.inputs[1]) if len(node.inputs) > 1 else None
        return None if value is None or None in value.reshape(-1) else [int(a) for a in value.reshape(-1)]

    def _unsqueeze(self, node: gs.Node) -> bool:
        axes = self._listed(node)
        if axes is None:
            return False
        rank = len(self.axes) + len(axes)
        if any(not -rank <= a < rank for a in axes):
            return False
        for axis in sorted(a % rank for a in axes):
            self.axes.insert(axis, ())
        return True

    def _squeeze(self, node: gs.Node) -> bool:
        axes = self._listed(node)
        if axes is None or any(not -len(self.axes) <= a < len(self.axes) for a in axes):
            return False
        gone = {a % len(self.axes) for a in axes}
        if any(self.axes[a] for a in gone):
            return False
        self.axes = [axis for i, axis in enumerate(self.axes) if i not in gone]
        return True

    def _expand(self, node: gs.Node) -> bool:
        """The dimension of 1 beside the heads grows; or a single head does."""
        value = self._values.value(node.inputs[1])
        target: list[int | None] = [None] * len(self.axes) if value is None else list(value.reshape(-1))
        if len(target) != len(self.axes):
            return False
        single = [i for i, axis in enumerate(self.axes) if axis == ()]
        for i, (axis, length) in enumerate(zip(self.axes, target, strict=True)):
            if axis == () and length != 1 and len(single) == 1:
                self.axes[i] = (GROUP,)
                self._sizes[GROUP] = length
            elif axis == (HEADS,) and self._sizes[HEADS] == 1 and length not in (None, 1, -1):
                self.axes[i] = (HEADS, GROUP)
                self._sizes[GROUP] = length
            elif length not in (None, 1, -1) and self._size(axis) not in (None, length):
                return False
        return True

    def _reshape(self, node: gs.Node) -> bool:
        value = self._values.value(node.inputs[1])
        dims = self._values.dims(node.outputs[0])
        if value is None and dims is None:
            return False
        target: list[int | None] = list(dims or ()) if value is None else list(value.reshape(-1))
        made = _regrouped(self.axes, len(target))
        if made is None or not all(self._agree(axis, length) for axis, length in zip(made, target, strict=True)):
            return False
        self.axes = made
        return True

    def _agree(self, axis: Axis, length: int | None) -> bool:
        return length in (None, 0, -1) or self._size(axis) in (None, length)


def _regrouped(axes: list[Axis], rank: int) -> list[Axis] | None:
    """The dimensions after a Reshape to ``rank`` of them: repeated heads become one, then those in front; or apart again."""
    made = list(axes)
    if rank > len(made) and made[0][:1] == (BATCH,) and len(made[0]) > 1:
        made[:1] = [(BATCH,), made[0][1:]]
    while rank < len(made):
        if () in made:
            made.remove(())
            continue
        grouped = next((i for i in range(len(made) - 1) if made[i] == (HEADS,) and made[i + 1] == (GROUP,)), 0)
        made[grouped : grouped + 2] = [made[grouped] + made[grouped + 1]]
    return made if rank == len(made) else None
