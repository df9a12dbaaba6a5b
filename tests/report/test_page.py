"""The page: every chart has data, every word of the data is escaped, and a browser has nothing to complain about."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynrec_jax.report.svg import Point, areas, bins, lines

from ..commands import Made, dynrec, make, one_line

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ALONE = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic")  # fmt: skip
EVIL = "<script>alert('x')</script> & \"q\""


class Marks(HTMLParser):
    """Counts what is drawn in each chart, and refuses elements that are never closed."""

    def __init__(self) -> None:
        super().__init__()
        self.charts: list[int] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        kind = dict(attrs).get("class")
        if kind == "chart":
            self.charts.append(0)
        if kind == "mark":
            self.charts[-1] += 1


def marks_of(text: str) -> Marks:
    found = Marks()
    found.feed(text)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, str]:
    """A run on the synthetic set, and its page."""
    folder = tmp_path_factory.mktemp("page")
    sight = {"evaluation__split": "global_time", "evaluation__targets": "all", "model__query_time": True}
    run = make(folder, "synthetic:users=80,items=60,seed=0", **sight)
    assert dynrec("report", workdir=run.workdir) == 0
    return run, (run.workdir / "report.html").read_text(encoding="utf-8")


def test_every_chart_has_data_and_nothing_comes_from_outside(made: tuple[Made, str]):
    run, text = made
    found = marks_of(text)
    ways = {"history", "item_popularity", "user", "since_training", "item_age", "recent_change", "shift"}
    import json

    written = json.loads((run.workdir / "evaluation" / "drift_test.json").read_text())
    assert {way["name"] for way in written["slices"]} == ways
    shown = [way for way in written["slices"] if any(each["metrics"] for each in way["bins"])]
    # Loss, validation, the drift protocol, and of three users the planted interests and the inferred ones.
    assert len(found.charts) == 2 + len(shown) + 3 * 2
    assert min(found.charts) > 0
    assert "script" not in found.tags
    outside = re.findall(r'(?:src|href|url\()\s*=?\s*["\']?(?!data:)([a-z]+://[^"\')\s]+)', text)
    assert outside == []
    assert (run.workdir / "evaluation" / "drift_test.png").stat().st_size > 10_000
    assert written["recovery"].keys() == {"model", "popularity", "item_knn", "oracle"}


def test_the_parts_of_a_way_add_up_to_the_whole(made: tuple[Made, str]):
    import json

    folder = made[0].workdir / "evaluation"
    whole, parts = (json.loads((folder / f"{name}test.json").read_text()) for name in ("", "drift_"))
    for way in parts["slices"]:
        if way["name"] in ("recent_change", "shift"):
            continue  # not all queries are in a part
        assert sum(each["queries"] for each in way["bins"]) == whole["users"]
        for name, beside in (
            ("model", whole),
            ("popularity", whole["baselines"]["popularity"]),
            ("oracle", whole["oracle"]),
        ):
            filled = [each for each in way["bins"] if each["metrics"]]
            values = [each["metrics"][name]["ndcg@10"]["mean"] for each in filled]
            mean = np.average(values, weights=[each["queries"] for each in filled])
            assert mean == pytest.approx(beside["ndcg@10"], abs=1e-12), (way["name"], name)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt install chromium)")
def test_a_real_browser_shows_it_without_a_complaint(made: tuple[Made, str], tmp_path: Path):
    run, _ = made
    assert BROWSER is not None
    command = [BROWSER, *ALONE, f"--user-data-dir={tmp_path / 'chrome'}", "--enable-logging=stderr", "--v=0"]
    # No host resolves: as without a network.
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [*command, (run.workdir / "report.html").as_uri()], capture_output=True, timeout=120, check=True
    )
    shown = marks_of(done.stdout.decode())
    assert len(shown.charts) > 8
    assert min(shown.charts) > 0
    assert b"CONSOLE" not in done.stderr
    assert b"Refused to" not in done.stderr


def test_words_of_the_data_are_escaped():
    point = [Point(0.0, 1.0, 0.5, 1.5), Point(1.0, float("nan")), Point(2.0, 3.0)]
    drawn = [
        lines({EVIL: point}, EVIL, EVIL),
        bins({EVIL: point[:1]}, [EVIL], EVIL),
        areas([0.0, 1.0], {EVIL: [0.5, 0.2], "rest": [0.5, 0.8]}, [(0.0, EVIL)], EVIL),
    ]
    for text in drawn:
        found = marks_of(text)
        assert found.tags <= {"svg", "line", "text", "polyline", "polygon", "circle", "rect", "title"}
        assert "<script" not in text
        assert found.charts[0] > 0
    assert marks_of(drawn[0]).charts == [2], "a value that is not finite is not drawn"


def test_a_page_without_topics_times_or_titles_still_tells_its_users(tmp_path: Path):
    lines_of = [
        " ".join([f"{user:03d}", *(f"i{(user * 3 + n) % 20}" for n in range(6))]) for user in range(30)
    ]
    (tmp_path / "log.txt").write_text("\n".join(lines_of) + "\n")
    made = make(tmp_path, f"sequences:{tmp_path / 'log.txt'}")
    out = tmp_path / "page.html"
    assert dynrec("report", workdir=made.workdir, out=out, users="001,022") == 0
    text = out.read_text(encoding="utf-8")
    assert "User 001" in text
    assert "event 3" in text
    assert min(marks_of(text).charts) > 0


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "--workdir is missing"),
        ({"workdir": "{run}", "users": "nobody"}, "'nobody' is none of the"),
        ({"workdir": "{run}", "column": "colour"}, "name one with --column"),
        ({"workdir": "{run}", "out": "{run}"}, "no file can be written there"),
    ],
)
def test_mistakes_get_one_line(made: tuple[Made, str], capsys, values: dict[str, str], told: str):
    capsys.readouterr()
    assert (
        dynrec("report", **{name: value.format(run=made[0].workdir) for name, value in values.items()}) == 2
    )
    assert told in one_line(capsys)
