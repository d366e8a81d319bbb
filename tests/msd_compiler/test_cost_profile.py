"""Devices as data: the shipped profiles, curves, and what bad files are told."""

from __future__ import annotations

import math
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msd_compiler import OptionError
from msd_compiler.cost.profile import (
    BY_INSTRUCTION_SET,
    AcceleratorProfile,
    CpuProfile,
    Curve,
    Reads,
    Way,
    default_target,
    digest,
    load_target,
    parse_profile,
    target_names,
)

ROOT = Path(__file__).parents[2]
ACCELERATORS = ("ascend-910b", "ascend-950", "b200", "h200")
GOOD = """
family = "accelerator"
name = "toy"
description = "a toy"
dequantized = "memory"
dequantized_source = "made up"
matrix = { bf16 = { value = 2e12, source = "made up" }, int8 = { value = 4e12, source = "made up" } }
vector = { value = 1e11, source = "made up" }
read = { value = 1e12, source = "made up" }
on_chip_bytes = { value = 1000000, source = "made up" }
node = { value = 1e-6, source = "made up" }
"""
CPU = """
family = "cpu"
name = "toy"
description = "a toy"
instruction_set = "scalar"
node = { value = 1e-6, source = "made up" }
products = { value = 1e9, source = "made up" }
reads = { bytes = [1e3, 1e6], bytes_per_second = [1e10, 1e9], source = "made up" }
[[linear]]
way = "msd"
bits = 8
terms = 2
per_activation = 1e-9
per_weight = { at = [1, 4], seconds = [1e-9, 2e-9] }
per_group = { at = [1], seconds = [0] }
source = "made up"
"""


# ---- Shipped -----------------------------------------------------------------------------------------------------------


def sources(value: object) -> list[str]:
    """Every source in a profile; fails for a figure that has none."""
    if isinstance(value, dict):
        if "value" in value:
            assert value["source"].strip()
        own = [value["source"]] if "source" in value else []
        return own + [s for v in value.values() for s in sources(v)]
    if isinstance(value, list | tuple):
        return [s for v in value for s in sources(v)]
    return []


@pytest.mark.parametrize("name", target_names())
def test_shipped_profiles(name):
    profile = load_target(name)
    assert profile.name == name
    assert sources(profile.model_dump())
    assert digest(profile) == digest(load_target(name))
    assert len(digest(profile)) == 12


def test_shipped_families():
    assert set(ACCELERATORS) | {"cpu-arm-dotprod"} <= set(target_names())
    for name in target_names():
        assert isinstance(load_target(name), AcceleratorProfile if name in ACCELERATORS else CpuProfile)


@pytest.mark.parametrize("name", ACCELERATORS)
def test_rates_of_number_formats(name):
    """Near the paper's: INT8 and FP8 twice bf16, FP4 four times; the public vector units are far slower than any."""
    profile = load_target(name)
    assert isinstance(profile, AcceleratorProfile)
    bf16 = profile.matrix["bf16"].value
    for number, times in (("int8", 2), ("fp8", 2), ("fp4", 4)):
        if number in profile.matrix:
            assert profile.matrix[number].value / bf16 == pytest.approx(times, rel=0.01)
    assert 5 < bf16 / profile.vector.value < 50


def test_only_ascend_950_and_b200_have_fp4():
    with_fp4 = [name for name in ACCELERATORS if "fp4" in load_target(name).matrix]
    assert with_fp4 == ["ascend-950", "b200"]


def test_arm_curves_are_its_instruction_counts():
    """16 weights: one unpacking per pair of rows, two dot products per row; 80 % of two instructions per clock at 3 GHz."""
    profile = load_target("cpu-arm-dotprod")
    assert isinstance(profile, CpuProfile)
    (kernel,) = (k for k in profile.linear if k.way is Way.MSD and k.bits == 4 and k.terms == 2)
    for rows in (1, 2, 4, 16, 64):
        instructions = (math.ceil(rows / 2) + 2 * rows) / 16
        assert kernel.per_weight(rows) == pytest.approx(instructions / (0.8 * 6e9), rel=0.01)


def test_a_target_for_every_instruction_set():
    assert set(BY_INSTRUCTION_SET.values()) <= {*target_names(), "cpu-avx512-vnni"}
    assert default_target("neon-dotprod") == "cpu-arm-dotprod"
    assert default_target(None) == default_target("avx2") == "cpu-avx2"


# ---- Files -------------------------------------------------------------------------------------------------------------


def test_a_file(tmp_path):
    file = tmp_path / "toy.toml"
    file.write_text(GOOD, encoding="utf-8")
    assert load_target(str(file)) == parse_profile(GOOD, "elsewhere")


def test_digest_is_of_what_is_said():
    same = "# a comment\n" + GOOD.replace("2e12", "2000000000000")
    assert digest(parse_profile(GOOD, "")) == digest(parse_profile(same, ""))
    assert digest(parse_profile(GOOD, "")) != digest(parse_profile(GOOD.replace("2e12", "3e12"), ""))


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ('vector = { value = 1e11, source = "made up" }', "", "vector: Field required"),
        ('vector = { value = 1e11, source = "made up" }', "vector = 1e11", "vector: "),
        ("value = 1e11", "value = -1e11", "vector.value: Input should be greater than 0"),
        ("value = 1e11", "value = 0", "vector.value: Input should be greater than 0"),
        ("value = 1e11", "value = nan", "vector.value: Input should be a finite number"),
        ("value = 1e11", "value = inf", "vector.value: Input should be a finite number"),
        ("value = 1e11", 'value = "1e11"', "vector.value: Input should be a valid number"),
        ("value = 1e11", "value = true", "vector.value: Input should be a valid number"),
        ("value = 1e11", "value = [1e11]", "vector.value: Input should be a valid number"),
        ('1e11, source = "made up"', '1e11, source = ""', "vector.source: String should have at least 1 character"),
        ('1e11, source = "made up"', "1e11", "vector.source: Field required"),
        ("vector =", "vectors =", "vector"),
        ('name = "toy"', 'name = "toy"\ncolour = "red"', "colour: Extra inputs are not permitted"),
        ("int8 =", "int4 =", "matrix.int4: Input should be 'fp32', 'bf16', 'fp8', 'int8' or 'fp4'"),
        ('dequantized = "memory"', 'dequantized = "disk"', "dequantized: Input should be 'memory' or 'registers'"),
        ('family = "accelerator"', 'family = "abacus"', "family is 'abacus'; it must be one of cpu, accelerator"),
        ('family = "accelerator"', "", "family is None"),
        ('family = "accelerator"', 'family = ["cpu"]', "family is ['cpu']"),
        ("family =", "family", "Expected"),
    ],
)
def test_bad_accelerators(was, becomes, message):
    assert was in GOOD
    with pytest.raises(OptionError) as error:
        parse_profile(GOOD.replace(was, becomes, 1), "toy.toml")
    assert str(error.value).startswith("toy.toml: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("at = [1, 4]", "at = [4, 1]", "linear.0.per_weight: sizes must ascend"),
        ("at = [1, 4]", "at = [1, 1]", "linear.0.per_weight: sizes must ascend"),
        ("at = [1, 4]", "at = [1]", "linear.0.per_weight: 1 sizes and 2 figures"),
        ("at = [1, 4]", "at = [0, 4]", "linear.0.per_weight.at.0: Input should be greater than 0"),
        ("at = [1, 4]", 'at = ["1", 4]', "linear.0.per_weight.at.0: Input should be a valid number"),
        ("[1e-9, 2e-9]", "[1e-9, -2e-9]", "linear.0.per_weight.seconds.1: Input should be greater than or equal to 0"),
        ("[1e-9, 2e-9]", "[]", "linear.0.per_weight.seconds: "),
        ("[1e10, 1e9]", "[1e10]", "reads: 2 sizes and 1 figures"),
        ("bytes = [1e3, 1e6]", "bytes = [1e6, 1e3]", "reads: sizes must ascend"),
        ('way = "msd"', 'way = "abacus"', "linear.0.way: "),
        ("bits = 8", "bits = 5", "linear.0.bits: "),
        ("per_activation = 1e-9\n", "", "linear.0.per_activation: Field required"),
    ],
)
def test_bad_cpus(was, becomes, message):
    assert was in CPU
    with pytest.raises(OptionError) as error:
        parse_profile(CPU.replace(was, becomes, 1), "toy.toml")
    assert f"toy.toml: {message}" in str(error.value)


def test_no_such_target(tmp_path):
    with pytest.raises(OptionError, match=r"abacus: neither a target \(.*h200.*\) nor a file"):
        load_target("abacus")
    with pytest.raises(OptionError, match="nor a file"):
        load_target(str(tmp_path))
    with pytest.raises(OptionError, match="x: "):
        load_target("x" * 5000)
    with pytest.raises(OptionError):
        load_target("a\0b")


def test_unreadable_file(tmp_path):
    file = tmp_path / "toy.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match=rf"^{file}: cannot be read"):
        load_target(str(file))


def test_the_build_leaves_no_profile_out():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]["wheel"]
    assert settings["packages"]["msd_compiler"] == "msd_compiler"
    for file in (ROOT / "msd_compiler/cost/targets").iterdir():
        assert not any(fnmatch(file.name, pattern.removeprefix("**/")) for pattern in settings["exclude"])


@pytest.mark.parametrize("number", ["1" + "0" * 400, "0x1", "1_000", "1e400", "-0.0"])
def test_numbers_at_the_edge(number):
    text = GOOD.replace("value = 1e11", f"value = {number}")
    if number in ("0x1", "1_000"):
        assert parse_profile(text, "")
    else:
        with pytest.raises(OptionError, match=r"^toy: vector\.value: "):
            parse_profile(text, "toy")


# ---- Curves ------------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=8, unique=True).map(sorted)


@st.composite
def curves(draw):
    at = draw(SIZES)
    seconds = sorted(draw(st.lists(st.floats(0, 1e3), min_size=len(at), max_size=len(at))))
    return Curve(at=tuple(at), seconds=tuple(seconds))


@given(curves(), st.floats(1e-6, 1e12), st.floats(1e-6, 1e12))
def test_growing_costs_stay_growing(curve, a, b):
    small, large = sorted((a, b))
    assert curve(small) <= curve(large) * (1 + 1e-9) + 1e-300


@given(curves())
def test_curves_pass_through_their_points_and_their_ends(curve):
    for size, seconds in zip(curve.at, curve.seconds, strict=True):
        assert curve(size) == pytest.approx(seconds, rel=1e-9, abs=1e-12)
    assert curve(curve.at[0] / 2) == curve.seconds[0]
    assert curve(curve.at[-1] * 3) == pytest.approx(3 * curve.seconds[-1])


@given(SIZES, st.data(), st.floats(1e-6, 1e12))
def test_reads_lie_between_their_rates(sizes, data, footprint):
    rates = data.draw(st.lists(st.floats(1e6, 1e12), min_size=len(sizes), max_size=len(sizes)))
    reads = Reads(bytes=tuple(sizes), bytes_per_second=tuple(rates), source="made up")
    assert min(rates) * (1 - 1e-9) <= reads.rate(footprint) <= max(rates) * (1 + 1e-9)
    assert reads.rate(sizes[0] / 2) == pytest.approx(rates[0])
    assert reads.rate(sizes[-1] * 2) == pytest.approx(rates[-1])
    for size, rate in zip(sizes, rates, strict=True):
        assert reads.rate(size) == pytest.approx(rate)
