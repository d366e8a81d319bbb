"""A small language model that is trained here, on what every installation of Python carries, and exported as users export.

``python models/python_docs -o models/bundled`` reads the language reference and the docstrings of the standard library, learns a
vocabulary and a decoder of Llama's architecture, and writes model, vocabulary, held-out text and a record of all of it. It takes
about 40 minutes on one thread. ``--steps 2`` writes the same files in a minute, of a model that has learned nothing.

The same seed gives the same order of the same text. The weights still differ in their last bits, and from there in more, between
processors and versions of torch, and the text is that of the Python which runs this: the committed files are the record.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import products
import torch
import vocabulary
from corpus import documents
from export import export
from products import Tokens
from tokenizers import Tokenizer
from training import Plan, Record, Weights, new_model, settings, train

OFTEN = 2
"""How often the language reference is read each time round, for once that docstrings are."""


def main() -> None:
    """Train, export and write down."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    texts = [d for d in documents() if vocabulary.BEGIN not in d.text]  # it would be read as the token
    tokenizer = vocabulary.learned(d.text for d in texts if not d.held_out)
    plan = replace(Plan(), steps=arguments.steps, seed=arguments.seed)
    tokens = [Tokens(d, np.asarray(tokenizer.encode(d.text).ids, np.int64)) for d in texts]
    known, held_out = ([t for t in tokens if t.document.held_out == wanted] for wanted in (False, True))
    state = _trained(known, held_out, plan, arguments.weights)
    vocabulary.save(tokenizer, arguments.output)
    _write(state, tokenizer, known, held_out, arguments.output)
    print(arguments.output)


def _trained(known: Sequence[Tokens], held_out: Sequence[Tokens], plan: Plan, path: Path | None) -> dict[str, Any]:
    """Weights, record and settings: those in a file, if it is there, otherwise from a training that keeps them in it."""
    if path is not None and path.exists():
        return torch.load(path)
    model = new_model(vocabulary.SIZE, plan.seed)
    state: dict[str, Any] = {}

    def keep(weights: Weights, record: Record) -> None:
        state.update(weights=weights, record=vars(record), settings=settings(model, plan))
        if path is not None:
            torch.save(state, path)

    often = [t.ids for t in known for _ in range(OFTEN if t.document.is_reference else 1)]
    train(model, often, [t.ids for t in held_out], plan, keep)
    return state


def _write(
    state: dict[str, Any], tokenizer: Tokenizer, known: Sequence[Tokens], held_out: Sequence[Tokens], folder: Path
) -> None:
    """The model and everything beside it but the vocabulary."""
    model = new_model(vocabulary.SIZE, 0)
    model.load_state_dict(state["weights"])
    exported = folder / "model.onnx"
    difference = export(model, exported)
    evaluation, calibration = products.chosen(held_out)
    products.save_tokens(evaluation, folder / "evaluation.npz")
    products.save_text(evaluation, folder / "evaluation.txt")
    products.save_tokens(calibration, folder / "calibration.npz")
    products.save_prompts(tokenizer.encode, folder / "prompts.json")
    products.draw(state["record"], folder / "loss.svg")
    record = {
        "versions": products.versions(),
        "sources": products.sources([t.document for t in (*known, *held_out)]),
        "tokens": {"training": sum(t.ids.size for t in known), "held_out": sum(t.ids.size for t in held_out)},
        "reference_read": OFTEN,
        "settings": state["settings"],
        "curve": state["record"],
        "onnx_difference": difference,
        "held_out": products.with_bits(products.evaluated(exported, held_out), held_out),
        "evaluation": products.with_bits(products.evaluated(exported, evaluation), evaluation),
        "evaluation_first": products.evaluated(exported, products.first(evaluation)),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of the training; 2 to try the script")
    parser.add_argument("--seed", type=int, default=Plan.seed, help="of the first weights and the order of the text")
    parser.add_argument("--threads", type=int, default=1, help="that torch uses")
    parser.add_argument(
        "--weights", type=Path, help="file that keeps the training's weights; used in its place if there"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
