"""The generator of a news log in MIND's format."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np

from dynrec_jax.data.prepare import PrepareOptions, prepare
from dynrec_jax.data.synthetic.titles import TOPICS

from .reference import histories

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "make_news.py"


def make(out: Path, seed: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, f"--out={out}", "--users=30", "--news=400", f"--seed={seed}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_log_that_prepare_reads_with_clicks_that_follow_topics(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert make(tmp_path / name, seed).returncode == 0
    files = {
        name: [(tmp_path / name / file).read_bytes() for file in ("behaviors.tsv", "news.tsv")]
        for name in ("one", "two", "three")
    }
    assert files["one"] == files["two"]
    assert files["one"] != files["three"]
    dataset = prepare(PrepareOptions(source=f"mind:{tmp_path}/one", out=tmp_path / "out", shards=2))
    assert dataset.users == 30
    items = {row["item_id"]: row for row in dataset.items_table().to_pylist()}
    for row in items.values():
        topic = row["categories"][1]
        assert any(word in row["title"].split() for word in TOPICS[topic])
    found = histories(dataset.path)
    assert dataset.info["dropped"]["duplicates"] == 0  # nothing is read twice
    published = {item: int(item.removeprefix("N")) for item in items}  # numbered by day of publication
    same = np.mean(
        [
            items[one[0]]["categories"] == items[two[0]]["categories"]
            for events in found.values()
            for one, two in itertools.pairwise(events)
        ]
    )
    assert same > 0.15  # three topics of twenty are liked at a time; by chance it is a twentieth
    clicks = [
        (time, published[item]) for events in found.values() for item, time, kind in events if kind == 1
    ]
    assert np.corrcoef(np.array(clicks).T)[0, 1] > 0.7  # news is read while it is new
    assert {kind for events in found.values() for _, _, kind in events} == {1, 2}


def test_a_folder_that_exists_is_left_alone(tmp_path):
    done = make(tmp_path)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert list(tmp_path.iterdir()) == []
