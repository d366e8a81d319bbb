"""What can go wrong, as types. The command line turns `MsdError` into one sentence and exit status 2."""

from __future__ import annotations


class MsdError(Exception):
    """A mistake in what the user gave: what, where (node, tensor, file), and what was needed."""


class ModelError(MsdError):
    """The model file, or something it says, cannot be right."""


class OutputError(MsdError):
    """The result cannot be written where it was asked for."""


class OptionError(MsdError):
    """An option or argument has a value that means nothing here."""
