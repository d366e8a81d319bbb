"""What the demo finds, as ``msd demo --json`` prints it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Measured(_Row):
    """One way to run one rounding of the model."""

    weights: str = Field(description="float32, int8 or int4")
    run: str = Field(description="default session, or compiled")
    bytes: int = Field(description="of the model's file, with its data")
    perplexity: float
    exact_perplexity: float = Field(description="of what these weights mean: the oracle's")
    changed: int = Field(description="predictions whose likeliest token is not the oracle's")
    tokens_per_second: float = Field(0.0, description="one at a time, in one thread")
    continuation: str = Field("", description="of the prompt, the likeliest token each time")
    as_exact: int = Field(0, description="tokens of the continuation before the first that the oracle would not choose")


class Demo(_Row):
    """The demo."""

    model: str
    parameters: int = Field(description="floats of the model's weights")
    predictions: int = Field(description="tokens of the text that were predicted")
    prompt: str
    new_tokens: int
    rows: list[Measured]
    factor: float = Field(description="how much larger some channels are in `massive`")
    massive: list[Measured] = Field(
        description="the same function with massive activations (onnxruntime issue 29849); empty: it could not be made so"
    )
