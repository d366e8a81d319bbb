"""What an evaluation finds, as `msd evaluate --json` prints it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

DECADES = (-18, 3)
"""Powers of ten that the histogram of KL divergences reaches over; what lies outside is in its first and last bin."""

BINS_PER_DECADE = 4

DEFAULT, LEVEL_ZERO = "default session", "accuracy level 0"
"""Names of the source's own runs."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Flip(_Row):
    """A place where a run's top token is not the oracle's."""

    position: int = Field(description="of the token that is predicted, counted over all documents")
    margin: float = Field(description="the oracle's best logit less its logit at the run's top token")
    oracle: int = Field(description="the oracle's top token")
    found: int = Field(description="the run's")
    target: int = Field(description="what the text says")


class OracleRow(_Row):
    """The model's exact meaning."""

    perplexity: float
    accuracy: float = Field(description="share of predictions whose top token is the text's")


class RunRow(_Row):
    """One way to run the model, against the oracle."""

    name: str
    perplexity: float
    kl_mean: float = Field(description="KL divergence from the oracle's distribution to the run's, nats per prediction")
    kl_max: float
    same_top: float = Field(description="share of predictions with the oracle's top token")
    flips: list[Flip] = Field(description="all of them, largest margin first")
    kl_histogram: list[int] = Field(
        description="predictions by KL divergence, a bin per quarter of a decade from 1e-18"
    )


class SiteNoise(_Row):
    """What rounding does to one linear layer's output on the activations of the text."""

    node: str
    format: str
    k: int
    n: int
    crest: float = Field(
        description="largest magnitude of a block of K over the row's root mean square, root mean square over blocks"
    )
    weight_error: float = Field(
        description="relative L2 of the output, root mean square over rows, if each weight is off by its own step / sqrt(12)"
    )
    int8_error: float = Field(description="the same, of activations rounded to int8 per block, as at accuracy level 4")
    msd_error: float = Field(description="the same, of activations in two INT8 terms")
    int8_ratio: float = Field(
        description="int8_error over weight_error: above 1, rounding activations costs more digits"
    )
    msd_ratio: float


class TokensRow(_Row):
    """What was evaluated on."""

    name: str
    digest: str = Field(description="SHA-256 of ids and document starts")
    documents: int
    count: int
    window: int
    stride: int
    batch: int
    predictions: int = Field(description="that counted")


class Evaluation(_Row):
    """Runs of a model against its oracle, teacher-forced."""

    source: str | None
    onnxruntime: str
    tokens: TokensRow
    oracle: OracleRow
    runs: list[RunRow]
    sites: list[SiteNoise] | None = Field(None, description="if asked for: largest int8_ratio first")
    notes: list[str] = Field(default_factory=list)

    @property
    def results(self) -> list[RunRow]:
        """The runs of results, in the order given."""
        return [run for run in self.runs if run.name not in (DEFAULT, LEVEL_ZERO)]

    def run(self, name: str) -> RunRow | None:
        """A run by name; None: it is not among them."""
        return next((run for run in self.runs if run.name == name), None)

    def json_text(self) -> str:
        """As a JSON document."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"
