"""QuantizedLinear -> Add(y, constant row) -> QuantizedLinear with that bias."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from msd_compiler.facts import QuantizedLinear
from msd_compiler.linked import Linked
from msd_compiler.reader import Refiner

from .constants import row_vector


class FoldBias(Refiner):
    """Saves a pass over y. The constant stands on either side: dynamo writes it second, TorchScript first."""

    def refine(self, fact: QuantizedLinear, linked: Linked) -> QuantizedLinear:
        """See `Refiner`."""
        y = fact.y
        if fact.swapped[1] or fact.addend is not None or len(fact.weights) > 1:
            return fact
        if len(y.outputs) != 1 or any(y is o for scope in linked.scopes for o in scope.graph.outputs):
            return fact
        add = y.outputs[0]
        if add.op != "Add" or add.domain or len(add.inputs) != 2 or fact.scope.position(add) is None:
            return fact
        other = add.inputs[1] if add.inputs[0] is y else add.inputs[0]
        row = row_vector(other, fact.scope, linked, fact.weight.n, rank=fact.y_rank or 1)
        if row is None or fact.weight.n == 1:
            return fact
        bias = row if fact.bias is None else fact.bias + row
        return replace(fact, replaced=(*fact.replaced, add), y=add.outputs[0], bias=bias.astype(np.float32))
