"""What a model is used for: read from text and files, good and bad."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msd_compiler import OptionError
from msd_compiler.cost.workload import DEFAULT, MOST, Phase, Workload, parse_workload


def phases(text: str) -> list[Phase]:
    return list(parse_workload(text).phases)


def test_phases():
    assert phases("decode=0.8@batch2,context4096;prefill=0.2@512") == [
        Phase("decode", 0.8, 2, 1, 4096),
        Phase("prefill", 0.2, 1, 512, 512),
    ]


def test_shares_are_of_all_runs():
    assert [phase.share for phase in phases("a=3@1;b=1@2")] == [0.75, 0.25]


def test_default_is_one():
    assert [phase.name for phase in phases(DEFAULT)] == ["decode", "prefill"]


def test_file(tmp_path):
    file = tmp_path / "chat.workload"
    file.write_text(
        "# a chat; mostly short answers\ndecode=9@batch1,context1024\n\n  prefill=1@512 ; \n", encoding="utf-8"
    )
    assert parse_workload(str(file)) == parse_workload("decode=9@batch1,context1024;prefill=1@512")


PHASES = st.builds(
    Phase,
    st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,8}", fullmatch=True),
    st.floats(1e-3, 1e3),
    st.integers(1, 500),
    st.integers(1, 4000),
    st.integers(4000, MOST - 1),
)


@given(st.lists(PHASES, min_size=1, max_size=4, unique_by=lambda phase: phase.name))
def test_what_is_written_is_read(given_phases):
    text = ";".join(f"{p.name}={p.share!r}@batch{p.batch},{p.tokens},context{p.context}" for p in given_phases)
    found = parse_workload(text)
    assert isinstance(found, Workload)
    assert sum(phase.share for phase in found.phases) == pytest.approx(1)
    total = sum(phase.share for phase in given_phases)
    for phase, was in zip(found.phases, given_phases, strict=True):
        assert phase == Phase(was.name, pytest.approx(was.share / total), was.batch, was.tokens, was.context)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "workload is empty"),
        (" ; ", "workload is empty"),
        ("decode", "workload has 'decode'; needed name=share@sizes"),
        ("decode=1", "workload has 'decode=1'; needed name=share@sizes"),
        ("decode=x@1", "the share of 'decode' is 'x'; it must be a number above 0"),
        ("decode=0@1", "the share of 'decode' is '0'"),
        ("decode=-1@1", "the share of 'decode' is '-1'"),
        ("decode=nan@1", "the share of 'decode' is 'nan'"),
        ("decode=inf@1", "the share of 'decode' is 'inf'"),
        ("a=1e308@1;b=1e308@1", "the share of 'a' is '1e308'"),
        ("decode=1@rows5", "'decode' has the size 'rows5'; needed batchN, contextN or N tokens"),
        ("decode=1@-5", "'decode' has the size '-5'"),
        ("decode=1@5,", "'decode' has the size ''"),
        ("decode=1@²", "'decode' has the size '²'"),
        ("decode=1@" + "9" * 5000, "'decode' has the size '999"),
        ("decode=1@0", "'decode' has tokens as 0, needed 1 to 2147483647"),
        ("decode=1@batch2147483648", "'decode' has batch as 2147483648, needed 1 to 2147483647"),
        ("decode=1@5,tokens6", "'decode' has tokens twice"),
        ("decode=1@512,context4", "'decode' has 512 new tokens and a context of 4"),
        ("decode=1@batch65536,65536", "'decode' has 65536 times 65536 rows"),
        ("a=1@1;a=1@2", "workload names a phase twice: a, a"),
        ("nothing.workload", "workload has 'nothing.workload'"),
    ],
)
def test_bad(text, message):
    with pytest.raises(OptionError) as error:
        parse_workload(text)
    assert message in str(error.value)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    with suppress(OptionError):
        assert parse_workload(text).phases


def test_a_file_is_named(tmp_path):
    file = tmp_path / "w"
    file.write_text("decode=x@1", encoding="utf-8")
    with pytest.raises(OptionError, match=rf"^{file}: workload: the share of 'decode'"):
        parse_workload(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match=rf"^{file}: cannot be read"):
        parse_workload(str(file))


@pytest.mark.parametrize(
    ("symbolic", "rows"),
    [
        (7, 7),
        (None, 6),
        ("batch", 2),
        ("batch_size*sequence_length", 6),
        ("batch × 4", 8),
        ("past_sequence_length", 100),
        ("total_sequence_length", 100),
        ("seq", 3),
        ("²", 3),
        ("floor(seq/2)", 3),
    ],
)
def test_rows(symbolic, rows):
    assert Phase("prefill", 1, 2, 3, 100).rows(symbolic) == rows
