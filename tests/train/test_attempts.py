"""Starts of a run, and who of them may write."""

import json
from pathlib import Path

import pytest

from dynrec_jax.errors import HeldRunError
from dynrec_jax.train.attempts import begin, check_current


def test_the_newest_start_alone_may_write(tmp_path: Path):
    one = begin(tmp_path, 0, 2)
    check_current(tmp_path, one)
    two = begin(tmp_path, 40, 4)
    check_current(tmp_path, two)
    with pytest.raises(HeldRunError, match=f"{tmp_path}: this run was started again by process [0-9]+ of"):
        check_current(tmp_path, one)
    lines = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"], line["processes"]) for line in lines] == [(0, 0, 2), (1, 40, 4)]
    assert (two.number, two.first) == (1, one.first)


@pytest.mark.parametrize("torn", [b'{"attempt": 1, "beg', b"\n", b"[]\n", b"\xff\xfe"])
def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path, torn: bytes):
    one = begin(tmp_path, 0, 1)
    with (tmp_path / "attempts.jsonl").open("ab") as file:
        file.write(torn)
    check_current(tmp_path, one)
    two = begin(tmp_path, 3, 1)
    check_current(tmp_path, two)
    assert (two.number, two.first) == (1, one.first)
