"""A decoder model as tokens in, logits out: caches go from step to step inside the runtime, by IO binding."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np
import onnxruntime

from ..errors import ModelError, OptionError
from ..inputs.fills import make
from ..inputs.hypotheses import Guess, plan
from ..inputs.roles import Role
from ..runtime import RuntimeRefused, array_of, ort_value, run_bound
from .interface import Cache, Interface, read_interface


class Decoder:
    """A decoder model between two tokens: a session and its caches.

    Without ``capacity``, the cache that a step returns is what the next one takes, handed over without a copy. With it, caches are
    buffers of so many tokens, allocated once and written in place. A model without a cache gets all tokens again at every step.

    Attributes:
        length: tokens fed so far, padding included.
        capacity: as given.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, *, model: Any | None = None, capacity: int | None = None
    ) -> None:
        """Find the model's caches.

        Args:
            session: of the model.
            model: the same model as an `onnx.ModelProto`, without data if need be: what only its graph tells, and padding needs.
            capacity: tokens in shared buffers; None: caches grow.

        Raises:
            ModelError: the model is no decoder; says what is missing.
            OptionError: the model's caches cannot be such buffers, or must be.
        """
        self.session = session
        self.interface: Interface = read_interface(session, model)
        if capacity is not None and (not isinstance(capacity, Integral) or capacity < 1):
            raise OptionError(f"capacity is {capacity!r}; it must be a number of tokens, 1 or more")
        if capacity is not None and self.interface.no_buffer is not None:
            raise OptionError(f"capacity is {capacity}, but {self.interface.no_buffer}; leave it out")
        if capacity is None and self.interface.needs_buffer:
            raise OptionError("the model writes its caches into buffers; give their capacity in tokens")
        self.capacity = capacity
        self._head = 0  # which candidate for the last axis of its caches the model takes
        self._head_known = not any(c.past.head_sizes for c in self.interface.caches)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens; the next step may have another batch size."""
        self.length = 0
        self._caches: list[onnxruntime.OrtValue] = []  # as in `interface.caches`
        self._tokens = np.zeros((0, 0), np.int64)  # all of them, for a model without a cache
        self._padding = np.zeros(0, np.int64)  # [B]

    def step(self, tokens: np.ndarray, *, padding: np.ndarray | None = None) -> np.ndarray:
        """Feed tokens behind those fed before.

        Args:
            tokens: ``[B, n]`` integers, n >= 1; the same B until `reset`.
            padding: ``[B]``, how many tokens of a row come before its text and are not seen; first step only.

        Returns:
            Logits ``[B, n, V]`` float32; ``[B, 1, V]``, the last token's, where the model gives no others.

        Raises:
            OptionError: tokens do not fit the batch, the capacity or the model's id type, or padding is not possible.
            RuntimeRefused: onnxruntime cannot run the step. The tokens fed before stay.
            ModelError: the logits are of another shape.
        """
        tokens = self._checked(tokens)
        batch, n = tokens.shape
        if self.length == 0:
            self._padding = self._checked_padding(padding, batch, n)
        elif padding is not None and np.any(padding):
            raise OptionError("padding is for the first step; reset comes before another")
        return self._feed(tokens)

    def first_feed(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """What a first step feeds for ``[B, n]`` tokens, by input name, empty caches too; nothing is run or remembered.

        Where several sizes of a cache's last axis are possible, the one that the model took at its last first step.
        """
        self.reset()
        tokens = self._checked(tokens)
        self._padding = np.zeros(len(tokens), np.int64)
        caches = {c.past.name: array_of(self._empty(c, len(tokens), self._head)) for c in self.interface.caches}
        return dict(self._inputs(tokens, 0)) | caches

    def caches(self) -> dict[str, np.ndarray]:
        """What the model returned for the next step, by the output's name: with buffers of a fixed capacity, all of them."""
        return {c.present: array_of(v) for c, v in zip(self.interface.caches, self._caches, strict=False)}

    def _feed(self, tokens: np.ndarray) -> np.ndarray:
        """As `step`, in pieces where the model's ids have a fixed length."""
        n = tokens.shape[1]
        if not self.interface.caches:
            whole = np.concatenate([self._tokens.reshape(len(tokens), -1), tokens], axis=1)
            logits, _ = self._run(whole, 0, [])
            self._tokens, self.length = whole, self.length + n
            return logits[:, -n:]
        width = self.interface.ids.dims[1]
        if not isinstance(width, int) or width == n:
            return self._cached_step(tokens)
        if width < 1 or n % width:
            raise OptionError(f"the model takes {width} tokens at a time, and {n} were given")
        return np.concatenate([self._cached_step(tokens[:, i : i + width]) for i in range(0, n, width)], axis=1)

    def _cached_step(self, tokens: np.ndarray) -> np.ndarray:
        logits, self._caches = self._first(tokens) if not self._caches else self._run(tokens, self.length, self._caches)
        self.length += tokens.shape[1]
        return logits

    def _first(self, tokens: np.ndarray) -> tuple[np.ndarray, list[onnxruntime.OrtValue]]:
        """The step that starts from empty caches, with the likeliest head size that the model takes."""
        most = max(len(c.past.head_sizes) for c in self.interface.caches)
        refusal: RuntimeRefused | None = None
        for head in [self._head] if self._head_known else range(most):
            empty = [self._empty(cache, len(tokens), head) for cache in self.interface.caches]
            try:
                done = self._run(tokens, 0, empty)
            except RuntimeRefused as error:
                refusal = refusal or error
                continue
            self._head, self._head_known = head, True
            return done
        assert refusal is not None
        raise refusal

    def _empty(self, cache: Cache, batch: int, head: int) -> onnxruntime.OrtValue:
        past = cache.past
        sizes: dict[int | str, int] = {"@batch": batch, "@past": self.capacity or 0}
        shape = [size if isinstance(size, int) else sizes.get(size, 0) for size in past.dims]
        if past.head_sizes:
            shape[-1] = past.head_sizes[min(head, len(past.head_sizes) - 1)]
        try:
            return ort_value(np.zeros(shape, past.dtype))
        except (MemoryError, ValueError) as error:
            raise ModelError(f"cache {past.name!r} {shape} of {past.dtype} does not fit in memory") from error

    def _run(
        self, tokens: np.ndarray, past: int, caches: list[onnxruntime.OrtValue]
    ) -> tuple[np.ndarray, list[onnxruntime.OrtValue]]:
        """One run: logits, and what the next run gets as caches."""
        binding = self.session.io_binding()
        held: list[onnxruntime.OrtValue] = []  # onnxruntime reads the arrays where they are
        for name, array in self._inputs(tokens, past):
            held.append(ort_value(array))
            binding.bind_ortvalue_input(name, held[-1])
        binding.bind_output(self.interface.logits, "cpu")
        for cache, value in zip(self.interface.caches, caches, strict=True):
            binding.bind_ortvalue_input(cache.past.name, value)
            if self._in_place(cache):
                binding.bind_ortvalue_output(cache.present, value)
            else:
                binding.bind_output(cache.present, "cpu")
        run_bound(self.session, binding, quiet=not self._head_known)
        results = binding.get_outputs()
        # a buffer's memory is the array's that its first OrtValue holds, so that one is kept
        following = [
            value if self._in_place(cache) else result
            for cache, value, result in zip(self.interface.caches, caches, results[1:], strict=True)
        ]
        logits = array_of(results[0]).astype(np.float32, copy=False)
        if logits.ndim != 3 or len(logits) != len(tokens) or logits.shape[1] not in (1, tokens.shape[1]):
            found = f"logits {self.interface.logits!r} are {list(logits.shape)}"
            raise ModelError(f"{found} for {list(tokens.shape)} tokens; [batch, tokens, vocabulary] is needed")
        return logits, following

    def _in_place(self, cache: Cache) -> bool:
        return self.capacity is not None and cache.grows

    def _inputs(self, tokens: np.ndarray, past: int) -> Iterator[tuple[str, np.ndarray]]:
        """Everything but the caches."""
        ids, mask, positions = self.interface.ids, self.interface.mask, self.interface.positions
        batch, n = tokens.shape
        padding = self._padding[:, None]
        yield ids.name, np.ascontiguousarray(tokens, ids.dtype)
        if mask is not None:
            yield mask.name, (np.arange(past + n) >= padding).astype(mask.dtype)
        if positions is not None:
            counted = np.maximum(np.arange(past, past + n) - padding, 0).astype(positions.dtype)
            if len(positions.dims) == 1:
                counted = counted[0]
            elif len(positions.dims) == 3:  # time, height and width, which are one for text
                count = positions.dims[0] if isinstance(positions.dims[0], int) else 3
                counted = np.broadcast_to(counted, (count, batch, n))
            yield positions.name, np.ascontiguousarray(counted)
        if self.interface.others.inputs:
            yield from self._others(Guess(batch=batch, seq=n, past=past))

    def _others(self, lengths: Guess) -> Iterator[tuple[str, np.ndarray]]:
        others = self.interface.others
        try:
            planned = plan(others, lengths)
            for i, shape, fill in zip(others.inputs, planned.shapes, planned.fills, strict=True):
                if i.role is Role.TYPES:
                    yield i.name, np.zeros(shape, i.dtype)
                elif "_to_keep" in i.name:  # of how many tokens logits are wanted
                    yield i.name, np.full(shape, lengths.seq, i.dtype)
                else:
                    yield i.name, make(fill, shape, i.dtype, seed=0, name=i.name)
        except (MemoryError, ValueError) as error:
            raise ModelError(
                f"inputs {', '.join(repr(i.name) for i in others.inputs)} cannot be made: {error}"
            ) from error

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype.kind not in "iu":
            raise OptionError(
                f"tokens are {tokens.dtype}{list(tokens.shape)}; integers [batch, tokens], both 1 or more, are needed"
            )
        largest = int(np.iinfo(self.interface.ids.dtype).max)
        if tokens.min() < 0 or tokens.max() > largest:
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            raise OptionError(f"token id {wrong} is outside 0 to {largest}")
        if self.length and len(tokens) != len(self._padding):
            raise OptionError(
                f"{len(tokens)} rows of tokens follow {len(self._padding)}; reset comes before another batch"
            )
        if self.capacity is not None and self.length + tokens.shape[1] > self.capacity:
            raise OptionError(
                f"capacity {self.capacity} is too small: {tokens.shape[1]} tokens come after {self.length}"
            )
        return tokens

    def _checked_padding(self, padding: np.ndarray | None, batch: int, n: int) -> np.ndarray:
        if padding is None:
            return np.zeros(batch, np.int64)
        padding = np.asarray(padding)
        if padding.shape != (batch,) or padding.dtype.kind not in "iu" or padding.min() < 0 or padding.max() >= n:
            raise OptionError(f"padding must be {batch} integers, 0 to {n - 1}, one per row; found {padding.tolist()}")
        if padding.any() and self.interface.no_padding is not None:
            raise OptionError(
                f"prompts of different length cannot be padded: {self.interface.no_padding}; give them one by one"
            )
        return padding.astype(np.int64)
