"""Measure this machine, and say what was found as a profile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from ..bench.report import Setting
from ..errors import OptionError
from ..verification import Progress, silent
from .cpu import attention_bytes, attention_seconds, linear_seconds
from .fit import fit_attention, fit_linear, read_share
from .layers import Job, Product, Step
from .measure import Machine, ThisMachine
from .profile import AttentionKernel, CpuProfile, Curve, Figure, LinearKernel, Reads, Way
from .work import AttentionWork, LinearWork

_MIB = 2**20
_MANY = 128
"""Rows enough to tell what each of them costs."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    rows: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 64, 128, 512)
    """M of products: few rows one by one, for kernels take them by fours and eights."""
    k: int = 1792
    """No power of two: those meet themselves in caches."""
    n: int = 1920
    narrow: int = 128
    """N, for what grows with K alone."""
    short: int = 512
    """K, for what grows with N alone."""
    stored: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 12288))
    """K, N of weights that no cache holds, or not all of."""
    stored_rows: tuple[int, ...] = (1, 4)
    heads: int = 8
    kv_heads: int = 2
    sizes: tuple[int, int] = (64, 256)
    """Columns of a head."""
    context: int = 1024
    short_context: int = 64
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 128, 512)
    prompt: int = 256
    stored_cache: int = 64 * _MIB
    """Bytes of a key and value cache that no cache of the processor holds."""
    reads: tuple[int, ...] = tuple(size * _MIB for size in (2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256))
    passes: int = 5
    """Over everything: the best one counts, so that it does not matter what else runs for some seconds."""
    rounds: int = 2
    seconds: float = 1.5
    """Of each kernel in a pass; then fewer rounds."""


@dataclass(frozen=True)
class _Linear:
    """A kernel for products that is measured."""

    way: Way
    bits: Literal[2, 4, 8, 32]
    terms: Literal[2, 3] | None = None
    groups: tuple[int, ...] = (32, 128)
    """Lengths; one is enough where they make no difference."""
    per_channel: bool = False
    least_group: int = 1
    rows: tuple[int, ...] | None = None


_LINEAR = (
    *(_Linear(Way.MSD, bits, terms) for bits in (2, 4, 8) for terms in (2, 3)),
    *(_Linear(Way.SESSION, bits, groups=(32, 64)) for bits in (4, 8)),
    *(_Linear(Way.SESSION, bits, groups=(128, 256), least_group=128) for bits in (4, 8)),
    *(_Linear(Way.SESSION, bits, groups=(128,), per_channel=True) for bits in (4, 8)),
    _Linear(Way.FLOAT, 4),
    _Linear(Way.FLOAT, 8, rows=(1, 8, 64, 512)),  # 100 times as slow: no more is needed to keep away from it
    _Linear(Way.FLOAT_WEIGHT, 32, groups=(128,)),
)


@dataclass(frozen=True)
class _Attention:
    """A kernel for attention that is measured."""

    way: Way
    bits: Literal[4, 8, 32]


_ATTENTION = (
    _Attention(Way.SESSION, 32),
    _Attention(Way.SESSION, 8),
    _Attention(Way.SESSION, 4),
    _Attention(Way.MSD, 8),
    _Attention(Way.MSD, 4),
)


def calibrate(*, machine: Machine | None = None, plan: Plan | None = None, progress: Progress = silent) -> CpuProfile:
    """Measure what products and attention take on one thread; some 100 seconds.

    What the installed onnxruntime does not have is left out of the profile.

    Args:
        machine: what is measured; None: this one.
        plan: what is measured on it.
        progress: told what is being done.

    Raises:
        RuntimeRefused: the native library cannot be used.
        OptionError: no kernel of ours was measured.
    """
    machine, plan = machine or ThisMachine(), plan or Plan()
    setting = machine.describe()
    source = f"measured: {setting.cpu}, one thread, onnxruntime {setting.onnxruntime}"
    node = machine.node_seconds()
    times, rates = _measure(machine, plan, progress)
    reads = Reads(
        bytes=tuple(map(float, plan.reads)),
        bytes_per_second=_falling([_rounded(rate) for rate in rates]),
        source=f"{source}, reading a buffer again and again",
    )
    linear = [found for k in _LINEAR if (found := _linear(plan, k, times, node, reads, source)) is not None]
    attention = [step for k in _ATTENTION if (step := _attention(plan, k, times, node, reads, source)) is not None]
    if not any(kernel.way is Way.MSD for kernel in linear):
        raise OptionError("none of our products could be measured: see msd doctor")
    return CpuProfile(
        family="cpu",
        name="this machine",
        description=_description(setting),
        instruction_set=setting.instruction_set or "unknown",
        node=Figure(value=_rounded(node), source=f"{source}, an Add of four numbers among a hundred"),
        products=Figure(value=_rounded(machine.operations_per_second()), source=f"{source}, on registers"),
        reads=reads,
        linear=tuple(linear),
        attention=tuple(attention),
    )


def _description(setting: Setting) -> str:
    return f"{setting.cpu}, {setting.instruction_set}, one thread, measured with onnxruntime {setting.onnxruntime}"


def _measure(machine: Machine, plan: Plan, progress: Progress) -> tuple[dict[Job, float], list[float]]:
    """Seconds of every job that can run, the best of all passes; and read rates, the middle ones."""
    groups = [list(jobs) for jobs in _jobs(plan)]
    times: dict[Job, float] = {}
    rates = []
    for done in range(plan.passes):
        rates.append(machine.read_rates(plan.reads))
        for number, jobs in enumerate(groups):
            progress("measuring", done * len(groups) + number, plan.passes * len(groups))
            for job, time in zip(jobs, machine.times(jobs, plan.rounds, plan.seconds), strict=True):
                if time is not None:
                    times[job] = min(time, times.get(job, time))
    progress("measuring", plan.passes * len(groups), plan.passes * len(groups))
    return times, [median(found) for found in zip(*rates, strict=True)]


def _jobs(plan: Plan) -> Iterator[list[Job]]:
    for kernel in _LINEAR:
        yield [*_products(plan, kernel), *_stored_products(plan, kernel)]
    for step in _ATTENTION:
        yield [*_steps(plan, step), _stored_step(plan, step)]


def calibration_jobs(plan: Plan | None = None) -> set[Job]:
    """All that `calibrate` measures, so that a validation can measure something else."""
    return {job for jobs in _jobs(plan or Plan()) for job in jobs}


def _products(plan: Plan, kernel: _Linear) -> Iterator[Product]:
    rows = kernel.rows or plan.rows
    few, many = rows[0], max(m for m in rows if m <= _MANY)
    layers = [(plan.k, plan.n, group, rows) for group in kernel.groups]
    layers += [(plan.k, plan.narrow, kernel.groups[-1], (few, many)), (plan.short, plan.n, kernel.groups[-1], (many,))]
    for k, n, group, rows_here in layers:
        work = LinearWork(k, n, kernel.bits, group, per_channel=kernel.per_channel)
        yield from (Product(kernel.way, work, m, kernel.terms) for m in rows_here)


def _stored_products(plan: Plan, kernel: _Linear) -> Iterator[Product]:
    for k, n in plan.stored if kernel.rows is None else ():
        work = LinearWork(k, n // 4 if kernel.bits == 32 else n, kernel.bits, kernel.groups[-1], kernel.per_channel)
        yield from (Product(kernel.way, work, rows, kernel.terms) for rows in plan.stored_rows)


def _linear(
    plan: Plan, kernel: _Linear, times: Mapping[Job, float], node: float, reads: Reads, source: str
) -> LinearKernel | None:
    measured = {job: times[job] for job in _products(plan, kernel) if job in times}
    if len(measured) < len(list(_products(plan, kernel))):
        return None
    figures = fit_linear(measured, node)
    found = LinearKernel(
        way=kernel.way,
        bits=kernel.bits,
        per_channel=kernel.per_channel,
        least_group=kernel.least_group,
        terms=kernel.terms,
        call=_rounded(figures.call),
        per_activation=_rounded(figures.per_activation),
        per_output=_rounded(figures.per_output),
        per_weight=_rounded_curve(figures.per_weight),
        per_group=_rounded_curve(figures.per_group),
        source=source,
    )
    stored = [job for job in _stored_products(plan, kernel) if job in times]
    felt = [times[job] - node - linear_seconds(found, job.work, job.rows) for job in stored]
    waiting = [reads.waiting(job.work.weight_bytes, job.work.weight_bytes) for job in stored]
    return found.model_copy(update={"read_share": _rounded(read_share(felt, waiting))})


def _steps(plan: Plan, kernel: _Attention) -> Iterator[Step]:
    """Every number of rows; ours takes the query heads of a KV head together, so one of them is needed for one row."""
    shares_heads = kernel.way is Way.MSD
    layouts = [(plan.heads, tokens) for tokens in plan.tokens]
    if shares_heads:
        layouts += [(heads, 1) for heads in range(plan.kv_heads, plan.heads, plan.kv_heads) if heads & (heads - 1) == 0]
    for size in plan.sizes:
        for heads, tokens in layouts:
            work = AttentionWork(heads, plan.kv_heads, size, kernel.bits)
            yield Step(kernel.way, work, 1, tokens, plan.context)
    work = AttentionWork(plan.heads, plan.kv_heads, sum(plan.sizes) // 2, kernel.bits)
    yield Step(kernel.way, work, 1, 1, plan.short_context)
    yield Step(kernel.way, work, 1, plan.prompt, plan.prompt)


def _stored_step(plan: Plan, kernel: _Attention) -> Step:
    size = max(plan.sizes) // 2
    work = AttentionWork(4 * plan.heads, 4 * plan.kv_heads, size, kernel.bits)
    context = plan.stored_cache * 8 // (2 * work.kv_heads * size * kernel.bits)
    return Step(kernel.way, work, 1, 1, context)


def _attention(
    plan: Plan, kernel: _Attention, times: Mapping[Job, float], node: float, reads: Reads, source: str
) -> AttentionKernel | None:
    measured = {job: times[job] for job in _steps(plan, kernel) if job in times}
    if len(measured) < len(list(_steps(plan, kernel))):
        return None
    is_ours = kernel.way is Way.MSD
    figures = fit_attention(measured, node, shares_heads=is_ours, is_causal=is_ours)
    found = AttentionKernel(
        way=kernel.way,
        bits=kernel.bits,
        shares_heads=is_ours,
        is_causal=is_ours,
        call=_rounded(figures.call),
        per_activation=_rounded(figures.per_activation),
        per_cached=_rounded_curve(figures.per_cached),
        per_logit=_rounded_curve(figures.per_logit),
        source=source,
    )
    job = _stored_step(plan, kernel)
    if job not in times:
        return found
    work = job.work
    felt = times[job] - node - attention_seconds(found, work, job.batch, job.tokens, job.context)
    size = attention_bytes(work, job.batch, job.context)
    return found.model_copy(update={"read_share": _rounded(read_share([felt], [reads.waiting(size, size)]))})


def _falling(rates: list[float]) -> tuple[float, ...]:
    """Rates that do not rise with the size: where they were found to, something else ran."""
    return tuple(max(rates[i:]) for i in range(len(rates)))


def _rounded(value: float) -> float:
    """Four digits: no figure is better."""
    return float(f"{value:.4g}")


def _rounded_curve(curve: Curve) -> Curve:
    return Curve(at=curve.at, seconds=tuple(map(_rounded, curve.seconds)))
