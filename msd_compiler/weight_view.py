"""Where the scales of a quantized weight vary, followed through Transpose and Reshape, by shapes alone.

A weight ``[512, 1024]`` with one scale per 32 steps of axis 0 is three *atoms*: 16 that the scale varies along, 32 that it
does not, 1024 that it does. A Transpose permutes atoms, a Reshape regroups them, and at the end the atoms of K tell
the block size. Nothing is loaded to find that out; `arrange` then does to the data what was done to the shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np


class NotAligned(Exception):
    """A Reshape splits or joins dimensions in a way that the scales cannot follow."""


@dataclass(frozen=True)
class Atom:
    """A run of consecutive elements of one dimension."""

    size: int
    varies: bool
    """Whether the scale differs along it."""
    source: tuple[int, int]
    """Original dimension, and the number of elements inside it that one step of this atom skips."""


@dataclass(frozen=True)
class WeightView:
    """A quantized tensor's dimensions as atoms, outermost first."""

    dims: tuple[tuple[Atom, ...], ...]
    stored: tuple[int, ...]
    """Shape of the stored codes, with a blocked axis rounded up to whole blocks."""
    real: tuple[int, ...]
    """Shape of the stored codes."""

    @classmethod
    def stored_as(cls, shape: tuple[int, ...], scale_shape: tuple[int, ...], axis: int, block_size: int) -> WeightView:
        """The view of codes as DequantizeLinear sees them.

        Args:
            shape: of the codes.
            scale_shape: ``()`` or ``(1,)`` per tensor, ``(shape[axis],)`` per axis, else the codes' rank, blocked.
            axis: in ``[0, rank)``.
            block_size: 0 if the scales are not blocked.

        Raises:
            ValueError: the scales do not fit the codes; the message says what shape is needed.
        """
        dims: list[tuple[Atom, ...]] = [(Atom(size, False, (d, 1)),) for d, size in enumerate(shape)]
        stored = list(shape)
        if block_size:
            needed = [-(-size // block_size) if d == axis else size for d, size in enumerate(shape)]
            if list(scale_shape) != needed:
                raise ValueError(
                    f"shape {list(scale_shape)}, expected {needed} (blocks of {block_size} on axis {axis})"
                )
            block_size = min(
                block_size, max(shape[axis], 1)
            )  # one block is all of the axis, however long it claims to be
            dims = [(Atom(size, True, (d, 1)),) for d, size in enumerate(shape)]
            dims[axis] = (Atom(needed[axis], True, (axis, block_size)), Atom(block_size, False, (axis, 1)))
            stored[axis] = needed[axis] * block_size
        elif prod(scale_shape) != 1 or (len(scale_shape) == 1 and len(shape) and shape[axis] == 1):
            if list(scale_shape) != [shape[axis]]:
                raise ValueError(
                    f"shape {list(scale_shape)}, expected [{shape[axis]}] (one per slice of axis {axis}), or one"
                )
            dims[axis] = (Atom(shape[axis], True, (axis, 1)),)
        elif len(scale_shape) > 1:
            raise ValueError(f"shape {list(scale_shape)}, expected a scalar or one dimension")
        return cls(tuple(dims), tuple(stored), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Current shape, blocked axes rounded up."""
        return tuple(prod(a.size for a in dim) for dim in self.dims)

    @property
    def padded(self) -> bool:
        """Whether the last block of the blocked axis is incomplete."""
        return self.stored != self.real

    def real_size(self, dim: int) -> int:
        """Size of a current dimension without the rounding up."""
        size = self.shape[dim]
        axes = {a.source[0] for a in self.dims[dim]}
        for axis in axes:
            if self.stored[axis] != self.real[axis]:
                size -= self.stored[axis] - self.real[axis]
        return size

    def transposed(self, permutation: tuple[int, ...]) -> WeightView:
        """The view after a Transpose.

        Raises:
            NotAligned: that is no permutation of its dimensions.
        """
        if sorted(permutation) != list(range(len(self.dims))):
            raise NotAligned(f"{list(permutation)} is no permutation of {len(self.dims)} dimensions")
        return replace(self, dims=tuple(self.dims[p] for p in permutation))

    def reshaped(self, shape: tuple[int, ...]) -> WeightView:
        """The view after a Reshape to ``shape`` (no -1, no 0).

        Raises:
            NotAligned: see there.
        """
        if shape == tuple(self.real_size(d) for d in range(len(self.dims))):
            return self
        if self.padded:
            raise NotAligned("its last block is incomplete")
        atoms = _merged([a for dim in self.dims for a in dim])
        dims = []
        for size in shape:
            dim: list[Atom] = []
            missing = size
            while missing > 1:
                if not atoms:
                    raise NotAligned(f"shape {list(self.shape)} has too few elements for {list(shape)}")
                atom = atoms.pop(0)
                if missing % atom.size == 0:
                    dim.append(atom)
                    missing //= atom.size
                elif atom.size % missing == 0:
                    inner = atom.size // missing
                    axis, step = atom.source
                    dim.append(Atom(missing, atom.varies, (axis, step * inner)))
                    atoms.insert(0, Atom(inner, atom.varies, (axis, step)))
                    missing = 1
                else:
                    raise NotAligned(
                        f"{list(self.shape)} to {list(shape)} cuts through a run of {atom.size} that shares a scale"
                    )
            dims.append(tuple(dim))
        if any(a.size != 1 for a in atoms):
            raise NotAligned(f"shape {list(self.shape)} has too many elements for {list(shape)}")
        return replace(self, dims=tuple(dims))

    def block_size(self, dim: int) -> int | None:
        """Elements of a dimension that share a scale in one run; None if the scale does not vary along it."""
        block = 1
        for atom in reversed(self.dims[dim]):
            if atom.varies and atom.size > 1:
                return block
            block *= atom.size
        return None

    def arrange_codes(self, codes: np.ndarray) -> np.ndarray:
        """The codes in the current shape, incomplete blocks filled with zeros."""
        if self.padded:
            codes = np.pad(codes, [(0, s - r) for s, r in zip(self.stored, self.real, strict=True)])
        return self._arrange(codes).reshape(self.shape)

    def arrange_scales(self, values: np.ndarray, dim: int) -> np.ndarray:
        """One value per block of ``dim`` and element of the others, in the current order of dimensions.

        ``values`` has the shape of the scales; dimension ``dim`` of the result is cut to its blocks.
        """
        block = self.block_size(dim) or self.shape[dim]
        per_atom = self._arrange_scales(values)
        outer: list[Atom] = []
        done = 1
        for atom in reversed(self.dims[dim]):
            if done < block:
                done *= atom.size
            else:
                outer.insert(0, atom)
        shape, result = [], []
        for d, atoms in enumerate(self.dims):
            kept = outer if d == dim else list(atoms)
            shape += [a.size for a in kept]
            result.append(prod(a.size for a in kept))
            if d == dim:
                first = sum(len(x) for x in self.dims[:d]) + len(kept)
                index: list[slice | int] = [slice(None)] * per_atom.ndim
                index[first : first + len(atoms) - len(kept)] = [0] * (len(atoms) - len(kept))
        return np.ascontiguousarray(np.broadcast_to(per_atom[tuple(index)], shape)).reshape(result)

    def _order(self) -> tuple[list[Atom], list[int]]:
        """The atoms in stored order, and for each current atom its position in it."""
        current = [a for dim in self.dims for a in dim]
        stored = sorted(current, key=lambda a: (a.source[0], -a.source[1], -a.size))
        return stored, [next(i for i, s in enumerate(stored) if s is a) for a in current]

    def _arrange(self, codes: np.ndarray) -> np.ndarray:
        stored, order = self._order()
        return codes.reshape([a.size for a in stored]).transpose(order)

    def _arrange_scales(self, values: np.ndarray) -> np.ndarray:
        stored, order = self._order()
        return values.reshape([a.size if a.varies else 1 for a in stored]).transpose(order)


def _merged(atoms: list[Atom]) -> list[Atom]:
    """Neighbours of one original dimension that behave alike, joined, so that a Reshape may cut elsewhere."""
    merged: list[Atom] = []
    for atom in atoms:
        if atom.size == 1:
            continue
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.varies == atom.varies
            and last.source[0] == atom.source[0]
            and last.source[1] == atom.size * atom.source[1]
        ):
            merged[-1] = Atom(last.size * atom.size, atom.varies, atom.source)
        else:
            merged.append(atom)
    return merged
