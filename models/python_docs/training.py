"""The model, and how it learns: AdamW, warm-up and cosine, the weights kept that do best on what is held out."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 512

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """The numbers of a training; all of them are written down beside the model.

    First the rate warms up and falls along a cosine, until all steps are done or the validation has not improved for ``patience``
    looks in a row. Then, from the best weights so far, it falls to 0 on a line, while windows are as long as the context.
    """

    seed: int = 0
    steps: int = 3000  # at most
    tokens: int = 4096  # of a step
    window: int = 256  # tokens; the context is only needed at the end, and attention over it takes longer
    rate: float = 3e-3
    last_rate: float = 0.05  # of the rate
    warm_up: int = 100
    every: int = 100  # steps between looks at the validation
    patience: int = 2
    end_steps: int = 200
    end_rate: float = 0.4  # of the rate
    end_every: int = 50
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    half: bool = True  # products in bfloat16, weights and sums in float32


@dataclass(frozen=True)
class Stage:
    """One part of a training."""

    seed: int
    steps: int
    window: int
    every: int
    patience: int
    share: Callable[[int], float]
    """Of the rate, at a step."""


def stages(plan: Plan) -> tuple[Stage, Stage]:
    """The two that a plan describes."""
    first = Stage(plan.seed, plan.steps, plan.window, plan.every, plan.patience, lambda step: _cosine(step, plan))
    line = partial(_line, plan=plan)
    return first, Stage(plan.seed + 1, min(plan.steps, plan.end_steps), CONTEXT, plan.end_every, plan.steps, line)


@dataclass
class Record:
    """What happened: one row for each look at the validation. Losses are in nats a token."""

    step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    kept_step: int = 0

    def add(self, step: int, train_loss: float, validation_loss: float, seconds: float) -> None:
        """One more row."""
        self.step.append(step)
        self.train_loss.append(round(train_loss, 4))
        self.validation_loss.append(round(validation_loss, 4))
        self.seconds = round(seconds, 1)


def new_model(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """Llama's architecture, small: 6 layers, 4 heads on 2 cached ones, the head tied to the embedding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation="eager",  # at this size faster than the fused attention, whose way back is slow on a CPU
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    documents: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    plan: Plan,
    keep: Callable[[Weights, Record], None],
) -> None:
    """Train a model in place and leave it with the weights that were best on ``held_out``.

    Args:
        documents: token ids; each starts with the token that begins a document. One that is given twice counts twice.
        keep: called after each look at the validation with the best weights so far.
    """
    record = Record()
    for stage in stages(plan):
        learn(model, documents, held_out, plan, stage, record, keep)


def learn(
    model: LlamaForCausalLM,
    documents: Sequence[np.ndarray],
    held_out: Sequence[np.ndarray],
    plan: Plan,
    stage: Stage,
    record: Record,
    keep: Callable[[Weights, Record], None],
) -> None:
    """One stage; goes on with a record whose best weights the model has, and leaves it with the best there are."""
    optimizer = torch.optim.AdamW(_groups(model, plan.decay), lr=plan.rate, betas=plan.betas, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, stage.share)
    kept, losses, missed = copy.deepcopy(model.state_dict()), [], 0
    done, seconds, start = max(record.step, default=0), record.seconds, time.monotonic()
    progress = tqdm(range(1, stage.steps + 1))
    for step, ids in zip(progress, batches(documents, plan.tokens, stage), strict=False):
        losses.append(_step(model, optimizer, torch.from_numpy(ids), plan))
        schedule.step()
        if step % stage.every and step != stage.steps:
            continue
        validation = loss_of(model, held_out)
        missed += 1
        if validation < min(record.validation_loss, default=math.inf):
            kept, record.kept_step, missed = copy.deepcopy(model.state_dict()), done + step, 0
        record.add(done + step, float(np.mean(losses)), validation, seconds + time.monotonic() - start)
        progress.set_postfix(train=record.train_loss[-1], validation=record.validation_loss[-1])
        losses.clear()
        keep(kept, record)
        if missed == stage.patience:
            break
    model.load_state_dict(kept)


def batches(documents: Sequence[np.ndarray], tokens: int, stage: Stage) -> Iterator[np.ndarray]:
    """Windows ``[rows, length + 1]`` of all documents one after the other, in another order each time round."""
    choice = np.random.RandomState(stage.seed)  # NumPy's frozen generator
    rest = np.empty(0, np.int64)
    needed = tokens // stage.window * (stage.window + 1)
    while True:
        while rest.size < needed:
            order = choice.permutation(len(documents))
            rest = np.concatenate([rest, *(documents[i] for i in order)])
        batch, rest = rest[:needed], rest[needed:]
        yield batch.reshape(-1, stage.window + 1)


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, documents: Sequence[np.ndarray]) -> float:
    """Mean loss a token in float32, each document by itself, in windows of the context, as an evaluation counts it."""
    total, count = 0.0, 0
    for document in documents:
        for start in range(0, len(document) - 1, CONTEXT):
            window = torch.from_numpy(document[start : start + CONTEXT + 1])[None]
            total += float(_loss(model, window, "sum"))
            count += window.shape[1] - 1
    return total / count


def settings(model: LlamaForCausalLM, plan: Plan) -> dict[str, Any]:
    """What a reader of the record needs to know of the model and its training."""
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape = {name: getattr(model.config, name) for name in (*kept, "head_dim", "vocab_size", "tie_word_embeddings")}
    return {"parameters": sum(p.numel() for p in model.parameters()), "context": CONTEXT, **shape, **asdict(plan)}


def _step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor, plan: Plan) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.half):
        loss = _loss(model, ids, "mean")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _loss(model: LlamaForCausalLM, ids: torch.Tensor, reduction: str) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def _groups(model: LlamaForCausalLM, decay: float) -> list[dict[str, Any]]:
    """Gains of norms do not decay."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]


def _cosine(step: int, plan: Plan) -> float:
    if step < plan.warm_up:
        return (step + 1) / plan.warm_up
    done = (step - plan.warm_up) / max(1, plan.steps - plan.warm_up)
    return plan.last_rate + (1 - plan.last_rate) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def _line(step: int, plan: Plan) -> float:
    return plan.end_rate * (1 - step / plan.end_steps)
