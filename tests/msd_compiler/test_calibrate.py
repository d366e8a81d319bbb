"""Measuring a machine: the fit, the file, the statistics of a validation, and the commands."""

from __future__ import annotations

import dataclasses
import json
import random
import tomllib

import numpy as np
import pytest
from typer.testing import CliRunner

from msd_compiler import cli
from msd_compiler.bench.report import Setting
from msd_compiler.cost import calibrate as calibration
from msd_compiler.cost import commands, measure, validate
from msd_compiler.cost.calibrate import Plan, calibrate
from msd_compiler.cost.layers import Product, bind, open_layer
from msd_compiler.cost.profile import CpuProfile, Way, load_target, parse_profile
from msd_compiler.cost.validate import ValidationRow
from msd_compiler.cost.work import LinearWork
from msd_compiler.cost.write import to_toml, write_profile
from msd_compiler.errors import OptionError, OutputError

SETTING = Setting(
    version=None, onnxruntime="1.32.0", cpu="pretended processor", instruction_set="avx512-vnni", threads=1
)


class Pretended:
    """A machine that does exactly what a profile says, but for what else runs on it."""

    def __init__(self, profile: CpuProfile, noise: float = 0.0, missing: tuple[Way, ...] = ()) -> None:
        self._profile, self._noise, self._missing = profile, noise, missing
        self._rng = random.Random(0)

    def describe(self):
        return SETTING

    def node_seconds(self):
        return self._profile.node.value

    def operations_per_second(self):
        return self._profile.products.value

    def read_rates(self, sizes):
        return [self._profile.reads.rate(size) for size in sizes]

    def times(self, jobs, rounds, seconds):
        assert len(set(jobs)) == len(jobs)
        return [None if job.way in self._missing else self._disturbed(job.predicted(self._profile)) for job in jobs]

    def _disturbed(self, seconds: float) -> float:
        return seconds * (1 + self._noise * self._rng.random())


@pytest.fixture(scope="module")
def known() -> CpuProfile:
    return load_target("cpu-avx512-vnni")


def errors(found: CpuProfile, known: CpuProfile) -> np.ndarray:
    """How far the predictions of one profile are from another's, over random layers."""
    jobs = [job for layer in validate.draw(3, 300) for case in layer for _, job, _ in case.ways]
    return np.array([job.predicted(found) / job.predicted(known) - 1 for job in jobs])


def test_a_known_machine_is_recovered(known):
    found = calibrate(machine=Pretended(known))
    assert found.node.value == known.node.value
    assert [(k.way, k.bits, k.terms, k.least_group) for k in found.linear] == [
        (k.way, k.bits, k.terms, k.least_group) for k in known.linear
    ]
    assert np.median(abs(errors(found, known))) < 0.01
    assert np.quantile(abs(errors(found, known)), 0.95) < 0.08  # 8 bits, float: few rows are measured


def test_a_disturbed_machine_is_recovered_too(known):
    off = errors(calibrate(machine=Pretended(known, noise=0.2)), known)
    assert np.median(abs(off)) < 0.06  # the least of three times of up to 20 % too much is 5 % too much
    assert np.quantile(abs(off), 0.95) < 0.2


def test_the_file_is_what_was_measured(known, tmp_path):
    found = calibrate(machine=Pretended(known))
    write_profile(found, tmp_path / "mine.toml")
    assert load_target(str(tmp_path / "mine.toml")) == found
    assert to_toml(found) == to_toml(parse_profile(to_toml(found), "again"))
    table = tomllib.loads(to_toml(found))
    stated = [table["node"], table["products"], table["reads"], *table["linear"], *table["attention"]]
    assert all(part["source"].startswith("measured: pretended processor, one thread") for part in stated)
    with pytest.raises(OutputError, match="cannot be written"):
        write_profile(found, tmp_path)


def test_what_onnxruntime_lacks_is_left_out(known):
    found = calibrate(machine=Pretended(known, missing=(Way.FLOAT,)))
    assert {k.way for k in found.linear} == {Way.MSD, Way.SESSION, Way.FLOAT_WEIGHT}
    with pytest.raises(OptionError, match="none of our products could be measured"):
        calibrate(machine=Pretended(known, missing=(Way.MSD,)))


def test_nothing_is_validated_that_was_measured():
    jobs = {job for layer in validate.draw(0, 200) for case in layer for _, job, _ in case.ways}
    assert not calibration.calibration_jobs() & jobs


def test_cases_are_drawn_from_the_seed():
    cases = [case for layer in validate.draw(0, 160) for case in layer]
    assert len(cases) == len({case.name for case in cases}) == 160
    assert cases == [case for layer in validate.draw(0, 160) for case in layer]
    assert cases != [case for layer in validate.draw(1, 160) for case in layer]
    products = [job for case in cases for _, job, _ in case.ways if isinstance(job, Product)]
    assert all(1 <= p.rows <= 512 and 512 <= p.work.k <= 11008 and 512 <= p.work.n <= 11008 for p in products)
    assert {p.work.group for p in products} == {32, 64, 128}
    assert {p.work.bits for p in products} == {4, 8}


def row(case: str, way: str, measured: float, predicted: float, error: float = 0.0) -> ValidationRow:
    return ValidationRow(case=case, way=way, measured_seconds=measured, predicted_seconds=predicted, error=error)


def test_statistics(known):
    rows = [
        row("a", "keep", 1.0, 1.1, error=1e-2),  # 10 % off, the fastest, and chosen
        row("a", "2 terms", 2.0, 2.0),
        row("b", "keep", 2.0, 1.0),  # half: chosen, and twice as slow as what is best
        row("b", "2 terms", 1.0, 1.2),
        row("c", "keep", 1.04, 1.0),  # chosen, 4 % slower than what is best
        row("c", "2 terms", 1.0, 1.05),
    ]
    report = validate.report_of(rows, SETTING, known, seed=0)
    assert report.cases == 3
    assert report.median_abs_error == pytest.approx((0.05 + 0.1) / 2)
    assert report.within_30 == pytest.approx(5 / 6)
    assert report.best_share == pytest.approx(2 / 3)
    assert report.regret == pytest.approx((1 + 2 + 1.04) / (1 + 1 + 1) - 1)
    assert report.within_budget.regret == pytest.approx((2 + 2 + 1.04) / (2 + 1 + 1) - 1)  # "keep" of a is not accurate


def test_of_ways_predicted_alike_the_more_accurate_one_is_chosen():
    found = validate.choices([[row("a", "1 term", 1.0, 1.0, 1e-2), row("a", "2 terms", 1.5, 1.0, 1e-4)]])
    assert found.regret == pytest.approx(0.5)


def test_validation_of_a_machine_that_is_as_predicted(known):
    report = validate.validate(known, machine=Pretended(known), cases=20)
    assert (report.cases, report.median_abs_error, report.within_30) == (20, 0.0, 1.0)
    assert (report.best_share, report.regret) == (1.0, 0.0)
    with pytest.raises(OptionError, match="cases is 0"):
        validate.validate(known, machine=Pretended(known), cases=0)


def test_a_picture(known, tmp_path):
    pytest.importorskip("matplotlib")
    report = validate.validate(known, machine=Pretended(known, noise=0.3), cases=10)
    validate.plot(report, tmp_path / "p.svg")
    assert "predicted ms" in (tmp_path / "p.svg").read_text()
    with pytest.raises(OptionError, match="must end with"):
        validate.plot(report, tmp_path / "p.txt")


SMALL = LinearWork(256, 64, 4, 32)


@pytest.mark.parametrize(
    "job",
    [
        Product(Way.MSD, SMALL, 3, 2),
        Product(Way.MSD, LinearWork(256, 64, 8, 128, per_channel=True), 3, 3),
        Product(Way.SESSION, SMALL, 3),
        Product(Way.SESSION, LinearWork(256, 64, 8, 128, per_channel=True), 3),
        Product(Way.FLOAT, SMALL, 3),
        Product(Way.FLOAT_WEIGHT, LinearWork(256, 64, 32, 256), 3),
    ],
    ids=lambda job: f"{job.way}{job.work.bits}",
)
def test_layers_run(job):
    bound = bind(job, open_layer(job))
    bound()
    assert bound.output("y").shape == (3, 64)
    assert np.isfinite(bound.output("y")).all()


def test_this_machine():
    """A tiny plan, on the processor that runs the test: only that all of it works."""
    plan = Plan(
        rows=(1, 2),
        k=512,
        n=64,
        narrow=32,
        short=256,
        stored=((256, 256),),
        sizes=(32, 64),
        context=64,
        short_context=16,
        tokens=(1, 2),
        prompt=32,
        stored_cache=2**16,
        reads=(2**16, 2**20),
        passes=1,
        rounds=1,
        seconds=0.1,
    )
    told = []
    found = calibrate(plan=plan, progress=lambda *step: told.append(step))
    assert {k.way for k in found.linear} == set(Way)
    assert found.node.value < 1e-4
    assert told[-1][1] == told[-1][2]
    assert measure.ThisMachine().describe().instruction_set == found.instruction_set


@pytest.fixture
def pretend(monkeypatch, known):
    """The commands measure a pretended machine."""
    for module in (calibration, validate):
        monkeypatch.setattr(module, "ThisMachine", lambda: Pretended(known))


def run(*arguments: str):
    return CliRunner().invoke(cli.app, arguments, catch_exceptions=True)


def test_command(pretend, tmp_path, known):
    path = tmp_path / "mine.toml"
    assert f"wrote {path}" in run("calibrate", "-o", str(path)).output.replace("\n", "")
    assert isinstance(load_target(str(path)), CpuProfile)
    assert parse_profile(run("calibrate").output, "printed") == load_target(str(path))
    said = json.loads(run("calibrate", "--validate", "--profile", str(path), "--cases", "12", "--json").output)
    assert said["cases"] == 12
    assert {"median_abs_error", "within_30", "best_share", "regret"} <= said.keys()
    table = run("calibrate", "--validate", "--profile", str(path), "--cases", "12").output
    assert "choices as fast as the best" in table


def test_targets():
    rows = json.loads(run("targets", "--json").output)["targets"]
    assert "cpu-avx2" in {r["name"] for r in rows}
    assert sum(r["is_default"] for r in rows) == 1
    assert "cpu-avx2" in run("targets").output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--profile", "cpu-avx2"], "--profile is for --validate"),
        (["--plot", "p.svg"], "--plot is for --validate"),
        (["--validate", "--profile", "nothing.toml"], "neither a target"),
        (["--validate", "--profile", "h200"], "no profile of a CPU"),
        (["--validate", "--profile", "cpu-avx2", "-o", "x.toml"], "--output is for a profile that is measured"),
        (["-o", "no/such/folder.toml"], "must be a file in an existing folder"),
    ],
)
def test_bad_options(options, reason):
    result = run("calibrate", *options)
    assert reason in str(result.exception)


def test_help_names_what_is_measured():
    assert "--validate" in run("calibrate", "--help").output
    assert dataclasses.is_dataclass(Plan)
    assert commands.CASES >= 150
