"""A byte-level vocabulary, and its pieces as plain bytes, for programs without the library that made it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SIZE = 1024
BEGIN = "<s>"
"""Starts every document; its id is 0."""


def learned(texts: Iterable[str]) -> Tokenizer:
    """A byte-pair encoding of all 256 bytes and the pairs that are frequent in these texts; encoding puts ``BEGIN`` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    return tokenizer


def pieces(tokenizer: Tokenizer) -> list[str]:
    """What each id stands for, one latin-1 character per byte; ``BEGIN`` stands for nothing."""
    # Byte-level encodings write the 188 printable bytes as themselves, the others as U+0100 and up, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return ["" if t == BEGIN else bytes(byte_of[c] for c in t).decode("latin-1") for t in tokens]


def text_of(ids: Iterable[int], table: Sequence[str]) -> str:
    """The text that ids stand for."""
    return b"".join(table[i].encode("latin-1") for i in ids).decode("utf-8", "replace")


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``pieces.json``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "pieces.json").write_text(json.dumps(pieces(tokenizer)) + "\n", "utf-8")
