"""Every way to compute a site on a target, and the choice among them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from msd_compiler.runtime_ops.matmul.layout import ActivationFormat

from msd_compiler.cost import error as law
from msd_compiler.cost.candidates import (
    BUDGETS,
    Candidate,
    Pricing,
    attention_candidates,
    decide,
    linear_candidates,
    total_bytes,
)
from msd_compiler.cost.profile import Profile, Way, load_target
from msd_compiler.cost.work import AttentionWork, LinearWork
from msd_compiler.cost.workload import parse_workload

INT4 = LinearWork(4096, 4096, 4, 32)
INT8 = LinearWork(4096, 4096, 8, 128, per_channel=True)
CACHE = AttentionWork(32, 8, 128, 8)


def pricing(target: str | Profile, workload: str = "decode=1@1", budget: float | None = None) -> Pricing:
    profile = load_target(target) if isinstance(target, str) else target
    return Pricing(profile, parse_workload(workload), BUDGETS[profile.family] if budget is None else budget)


def products(
    given: Pricing, work: LinearWork, source_way: Way = Way.SESSION, can_be_float: bool = True
) -> list[Candidate]:
    return linear_candidates(
        given,
        work,
        lambda phase: phase.batch * phase.tokens,
        source_way=source_way,
        can_be_float=can_be_float,
        activation=law.UNKNOWN,
    )


def by_name(candidates: list[Candidate]) -> dict[str, Candidate]:
    return {candidate.name: candidate for candidate in candidates}


DECOMPOSED = [f"{terms}{of}" for terms in ("1 term", "2 terms", "3 terms") for of in ("", ", a scale per row")]


def test_candidates_on_a_cpu():
    given = pricing("cpu-arm-dotprod")
    assert list(by_name(products(given, INT4))) == ["keep", "float activations", *DECOMPOSED]
    assert list(by_name(products(given, INT4, can_be_float=False))) == ["keep", *DECOMPOSED]
    assert list(by_name(products(given, INT4, Way.FLOAT))) == ["keep", *DECOMPOSED]


def test_keeping_is_as_wrong_as_the_session():
    """A default session rounds the activation to int8; floats are not rounded."""
    given = pricing("cpu-arm-dotprod")
    for way, error in ((Way.SESSION, law.relative_l2(1, 4096, 32)), (Way.FLOAT, law.FLOAT_ERROR)):
        assert by_name(products(given, INT4, way))["keep"].error == error
    float_weight = replace(INT4, bits=32)
    assert by_name(products(given, float_weight, Way.FLOAT_WEIGHT))["keep"].error == law.FLOAT_ERROR


def test_a_way_without_figures_says_so():
    found = by_name(products(pricing("cpu-arm-dotprod"), replace(INT4, bits=2)))
    assert found["keep"].why_not == "cpu-arm-dotprod has no figures for session with 2 bits"
    assert found["keep"].seconds == float("inf")
    assert found["2 terms"].why_not is None


def test_time_is_the_mean_over_the_workload():
    given = pricing("cpu-arm-dotprod", "decode=3@1;prefill=1@512")
    candidate = by_name(products(given, INT4))["2 terms"]
    decode, prefill = candidate.prices
    assert candidate.seconds == pytest.approx(0.75 * decode.seconds + 0.25 * prefill.seconds)


def test_candidates_on_an_accelerator():
    given = pricing("ascend-950")
    assert list(by_name(products(given, INT4))) == ["keep", *DECOMPOSED]


def test_fp4_terms_where_the_device_multiplies_them_faster_and_the_budget_allows_it():
    """Two passes of FP4 take as long as one of INT8 at half its rate, which keeps more bits (7.1 against 5.85): only where
    a device's INT8 is slower than that do they pay, as on those that were built for FP4 alone."""
    given, fp4 = pricing("ascend-950", "prefill=1@4096", budget=0.02), replace(INT4, is_fp4=True)
    assert decide(given, products(given, fp4)).chosen.activation is ActivationFormat.INT8
    matrix = {
        n: f.model_copy(update={"value": f.value / (8 if n == "int8" else 1)}) for n, f in given.profile.matrix.items()
    }
    slow_int8 = replace(given, profile=given.profile.model_copy(update={"matrix": matrix}))
    candidates = products(slow_int8, fp4)
    assert decide(slow_int8, candidates).chosen.activation is ActivationFormat.MXFP4_E2M1_X2
    assert decide(replace(slow_int8, budget=0.002), candidates).chosen.activation is ActivationFormat.INT8
    assert decide(slow_int8, candidates, terms=1).chosen.activation is ActivationFormat.INT8


def test_no_fp4_terms_without_a_unit():
    nowhere = by_name(products(pricing("ascend-910b"), replace(INT4, is_fp4=True)))["mxfp4x2-e2m1"]
    assert nowhere.why_not == "ascend-910b has no figure for a matrix unit in fp4"


def test_few_rows_are_decomposed_where_dequantizing_goes_through_memory():
    decided = decide(given := pricing("ascend-910b"), products(given, INT8))
    assert decided.chosen.way is Way.MSD
    assert decided.chosen.terms == 2
    assert decided.margin is not None
    assert decided.margin > 1


def test_groups_with_many_rows_are_left_alone():
    """Every group's sums would cross memory; the device's own kernels stop at 4 rows."""
    given = pricing("ascend-910b", "prefill=1@512")
    decided = decide(given, products(given, INT4))
    assert decided.chosen.name == "keep"
    assert decided.margin is not None
    assert decided.margin > 1


def test_of_those_as_fast_ours():
    given = pricing("h200", "prefill=1@4096")
    decided = decide(given, products(given, INT8))
    assert decided.chosen.terms == 2


def ours(terms: int, error: float, seconds: float) -> Candidate:
    return Candidate(f"{terms} terms", Way.MSD, error, terms, seconds=seconds)


@pytest.mark.parametrize(("budget", "terms"), [(1.0, 1), (1e-2, 2), (1e-4, 2), (1e-6, 3), (1e-9, 3)])
def test_the_budget_decides_the_terms(budget, terms):
    candidates = [ours(1, 2e-2, 1e-3), ours(2, 1e-5, 2e-3), ours(3, 3e-7, 4e-3)]
    assert decide(pricing("h200", budget=budget), candidates).chosen.terms == terms


def test_ours_wins_within_the_models_own_error():
    kept = Candidate("keep", Way.SESSION, 1e-3, seconds=1e-3)
    given = pricing("cpu-avx2", budget=1)
    on_accelerator = pricing("h200", budget=1)
    assert decide(on_accelerator, [kept, ours(2, 1e-5, 1.01e-3)]).chosen.name == "keep"  # the kernels are not ours
    assert decide(given, [kept, ours(2, 1e-5, 1.04e-3)]).chosen.name == "2 terms"
    assert decide(given, [kept, ours(2, 1e-5, 1.06e-3)]).chosen.name == "keep"
    assert decide(given, [ours(1, 1e-2, 1e-3), ours(2, 1e-5, 1.04e-3)]).chosen.name == "1 terms"  # both are ours


def test_margin_is_over_the_fastest_other_way():
    kept = Candidate("keep", Way.SESSION, 1e-3, seconds=3e-3)
    given = pricing("h200", budget=1)
    assert decide(given, [kept, ours(2, 1e-5, 2e-3)]).margin == pytest.approx(0.5)
    assert decide(given, [ours(2, 1e-5, 2e-3)]).margin is None


def test_what_is_not_chosen_from_says_why():
    given = pricing("cpu-arm-dotprod")
    judged = by_name(list(decide(given, products(given, INT4)).candidates))
    assert judged["1 term"].why_not == "its error is above the budget of 0.0001"
    assert judged["2 terms"].why_not is None
    judged = by_name(list(decide(given, products(given, INT4), terms=3).candidates))
    assert judged["2 terms"].why_not == "3 terms are needed"


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_terms_that_are_asked_for_win_over_the_budget(terms):
    given = pricing("cpu-arm-dotprod", budget=1e-12)
    assert decide(given, products(given, INT4), terms=terms).chosen.terms == terms


def test_nothing_within_the_budget():
    given = pricing("cpu-arm-dotprod", budget=1e-12)
    assert decide(given, products(given, INT4)).chosen.name == "float activations"
    two_bits = products(given, replace(INT4, bits=2))
    assert decide(given, two_bits).chosen.prices


def test_attention():
    given = pricing("ascend-910b", "decode=1@batch1,context8192")
    kept, rewritten = attention_candidates(given, CACHE, 8)
    assert (kept.name, rewritten.name) == ("keep", "2 terms, int8 cache")
    assert rewritten.seconds < kept.seconds
    assert [c.name for c in attention_candidates(given, CACHE, None)] == ["keep"]
    assert decide(given, [kept, rewritten]).chosen == rewritten
    assert decide(given, [kept, rewritten], terms=3).chosen.name == "keep"  # there is none of three terms


def test_a_float_cache_that_becomes_int8():
    given = pricing("ascend-910b", "decode=1@batch1,context8192")
    floats = replace(CACHE, bits=16)
    kept, rewritten = attention_candidates(given, floats, 8)
    assert rewritten.error > attention_candidates(given, CACHE, 8)[1].error
    assert rewritten.prices[0].bytes == kept.prices[0].bytes / 2


def test_total_bytes():
    assert total_bytes([INT8, replace(INT8, copies=3)]) == 4 * (4096 * 4096 + 4 * 4096)
