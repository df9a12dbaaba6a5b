"""The synthetic log against what it promises: bytes, the true distribution, and interests that drift."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from dynrec_jax.data import synthetic
from dynrec_jax.data.synthetic.titles import title
from dynrec_jax.errors import DataError

SMALL = synthetic.SyntheticSpec(users=300, items=120, topics=6, seed=3, events=20)


def read_rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    synthetic.write_log(SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def histories(log: Path) -> dict[str, list[tuple[int, int]]]:
    """(column of the item, time) of each user's events, in the order of the file."""
    column = {item: number for number, item in enumerate(synthetic.item_ids(SMALL))}
    events: dict[str, list[tuple[int, int]]] = {user: [] for user in synthetic.user_ids(SMALL)}
    for user, item, time in read_rows(log / "events.csv")[1:]:
        events[user].append((column[item], int(time)))
    return events


@pytest.fixture(scope="module")
def every_event(histories: dict[str, list[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The oracle's distribution before each event, what was drawn, and what the user had by then."""
    users = [user for user, events in histories.items() for _ in events]
    known = [number for events in histories.values() for number in range(len(events))]
    drawn = np.array([item for events in histories.values() for item, _ in events])
    seen = np.zeros((len(users), SMALL.items), bool)
    for row, (user, length) in enumerate(zip(users, known, strict=True)):
        seen[row, [item for item, _ in histories[user][:length]]] = True
    return synthetic.oracle_scores(SMALL, users, known), drawn, seen


def test_equal_specs_give_equal_bytes_and_another_seed_gives_others(log, tmp_path):
    names = ["events.csv", "items.csv"]
    synthetic.write_log(SMALL, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == [(log / name).read_bytes() for name in names]
    other = synthetic.SyntheticSpec(users=300, items=120, topics=6, seed=4, events=20)
    synthetic.write_log(other, tmp_path)
    assert (tmp_path / "events.csv").read_bytes() != (log / "events.csv").read_bytes()


def test_the_log_is_one_sequence_by_time(log, histories):
    header, *rows = read_rows(log / "events.csv")
    times = [int(time) for _, _, time in rows]
    assert header == ["user", "item", "time"]
    assert times == sorted(times)
    assert 0 < max(times) - min(times) <= SMALL.days * 86_400
    lengths = [len(events) for events in histories.values()]
    assert min(lengths) >= 5
    assert max(lengths) <= SMALL.items // 2
    assert np.mean(lengths) == pytest.approx(SMALL.events, rel=0.1)


def test_a_user_takes_an_item_once_and_at_a_time_of_its_own(histories):
    for events in histories.values():
        items, times = zip(*events, strict=True)
        assert len(set(items)) == len(items)
        assert len(set(times)) == len(times)


def test_long_histories_fit_into_a_short_log(tmp_path):
    spec = synthetic.SyntheticSpec(users=5, items=4_000, events=900, days=1)
    synthetic.write_log(spec, tmp_path)
    rows = read_rows(tmp_path / "events.csv")[1:]
    assert len({(user, time) for user, _, time in rows}) == len(rows)
    assert int(rows[-1][2]) - int(rows[0][2]) <= 86_400


def test_items_come_with_titles_and_topics(log):
    header, *rows = read_rows(log / "items.csv")
    ids, titles, topics = zip(*rows, strict=True)
    assert header == ["item_id", "title", "topic"]
    assert list(ids) == synthetic.item_ids(SMALL) == sorted(ids)
    assert len(set(titles)) == SMALL.items
    names = synthetic.topic_names(SMALL)
    assert [names.index(topic) for topic in topics] == synthetic.topic_of_items(SMALL).tolist()
    assert np.bincount(synthetic.topic_of_items(SMALL)).tolist() == [20] * 6


def test_titles_of_a_large_catalogue_differ():
    titles = {title(topic, place) for topic in (0, 19, 20, 44) for place in range(2_500)}
    assert len(titles) == 4 * 2_500


def test_the_oracle_is_a_distribution_over_what_the_user_has_not_had(every_event):
    scores, _, seen = every_event
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-12)
    assert not scores[seen].any()
    assert (scores[~seen] > 0).all()


def test_events_fall_as_often_as_the_oracle_says(every_event):
    scores, drawn, _ = every_event
    probability = scores[np.arange(len(drawn)), drawn]
    # Under the true distribution log p of what was drawn has these moments: z > 4 is one in 15,000.
    log_score = np.log(np.where(scores > 0, scores, 1.0))
    mean = np.sum(scores * log_score, axis=1)
    variance = np.sum(scores * log_score**2, axis=1) - mean**2
    assert abs(np.sum(np.log(probability) - mean)) < 4 * np.sqrt(np.sum(variance))
    # Reliability: of all (event, item) pairs with about the same probability, that share happened.
    happened = np.zeros_like(scores)
    happened[np.arange(len(drawn)), drawn] = 1
    bins = np.digitize(scores, [0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.6])
    expected = np.bincount(bins.ravel(), weights=scores.ravel())[1:]
    observed = np.bincount(bins.ravel(), weights=happened.ravel())[1:]
    assert expected.min() > 5
    assert (
        np.sum((observed - expected) ** 2 / expected) < 29.6
    )  # chi-square, 10 degrees of freedom, p = 0.001


def test_every_item_is_drawn_as_often_as_the_oracle_says(every_event):
    scores, drawn, _ = every_event
    observed = np.bincount(drawn, minlength=SMALL.items)
    spread = np.sqrt(np.sum(scores * (1 - scores), axis=0))
    z = (observed - scores.sum(axis=0)) / spread
    assert np.mean(z**2) == pytest.approx(1.0, abs=0.4)
    assert np.abs(z).max() < 4.5


def test_a_topic_of_the_oracle_is_the_planted_interest(every_event, histories):
    scores, _, _ = every_event
    user = next(iter(histories))
    times = [time for _, time in histories[user]]
    shares = synthetic.interests(SMALL, user, times)
    topic = synthetic.topic_of_items(SMALL)
    by_topic = np.stack([scores[: len(times), topic == z].sum(axis=1) for z in range(SMALL.topics)], axis=1)
    np.testing.assert_allclose(by_topic, shares, atol=1e-12)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, atol=1e-12)


def test_interests_drift_smoothly(histories):
    times = np.linspace(1_704_067_200, 1_704_067_200 + SMALL.days * 86_400, 721).astype(np.int64)
    switches = []
    for user in list(histories)[:10]:
        shares = synthetic.interests(SMALL, user, times)
        assert np.abs(np.diff(shares, axis=0)).max() < 0.15  # within six hours
        switches.append(np.count_nonzero(np.diff(shares.argmax(axis=1))))
    assert np.mean(switches) > 2


def test_the_successors_that_half_the_users_show_are_those_of_the_other_half(histories):
    topic = synthetic.topic_of_items(SMALL)
    follows = np.zeros((2, SMALL.items, SMALL.items))
    for half, events in enumerate(histories.values()):
        for (before, _), (after, _) in itertools.pairwise(events):
            follows[half % 2, before, after] += topic[before] == topic[after]
    chosen = np.argsort(-follows[0], axis=1)[:, :4]
    share = np.take_along_axis(follows[1], chosen, axis=1).sum() / follows[1].sum()
    popular = np.argsort(-follows[0].sum(axis=0) * (topic == topic[:, None]), axis=1)[:, :4]
    assert share > 1.5 * np.take_along_axis(follows[1], popular, axis=1).sum() / follows[1].sum()


def test_any_user_is_regenerated_alone():
    spec = synthetic.SyntheticSpec(users=600, items=60, topics=4, events=8, interests=2)
    users = synthetic.user_ids(spec)
    known = [number % 5 for number in range(len(users))]
    together = synthetic.oracle_scores(spec, users, known)
    rows = [599, 3, 300, 3]
    alone = synthetic.oracle_scores(spec, [users[row] for row in rows], [known[row] for row in rows])
    np.testing.assert_array_equal(alone, together[rows])
    assert synthetic.oracle_scores(spec, [], []).shape == (0, 60)


def test_topics_that_run_out_leave_their_share_to_the_others(tmp_path):
    spec = synthetic.SyntheticSpec(users=40, items=40, topics=20, events=20, interests=1)
    synthetic.write_log(spec, tmp_path)
    lengths = dict.fromkeys(synthetic.user_ids(spec), 0)
    for user, _, _ in read_rows(tmp_path / "events.csv")[1:]:
        lengths[user] += 1
    scores = synthetic.oracle_scores(spec, list(lengths), [length - 1 for length in lengths.values()])
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-12)


def test_parse_reads_what_is_given_and_keeps_the_defaults():
    spec = synthetic.parse("users=50, items=40,seed=7")
    assert (spec.users, spec.items, spec.seed, spec.topics) == (50, 40, 7, 20)
    assert synthetic.parse("") == synthetic.SyntheticSpec()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("people=5", "key of users, items, topics, seed"),
        ("users", "'users'"),
        ("users=many", "users='many' is not an integer"),
        ("users=2.5", "not an integer"),
        ("users=0", "users=0; expected an integer from 1"),
        ("items=3", "items=3; expected an integer from 20"),
        ("seed=-1", "seed=-1"),
        ("users=99999999999", "to 2147483647"),
        ("users=5,users=6", "given twice"),
        ("users=5,", "key=integer"),
        ("items=30,topics=40", "at most items=30"),
        ("topics=2,interests=3", "at most topics=2"),
    ],
)
def test_bad_specs_are_refused_in_one_line(text, told):
    with pytest.raises(DataError) as error:
        synthetic.parse(text)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("user", ["u300", "u3", "i001", "", "u0١1", "u-01"])
def test_unknown_users_are_refused(user):
    with pytest.raises(DataError, match="no user of this log"):
        synthetic.oracle_scores(SMALL, [user], [0])


def test_a_history_that_the_user_does_not_have_is_refused(histories):
    user = next(iter(histories))
    length = len(histories[user])
    with pytest.raises(DataError, match=f"history length {length} of a user with {length} events"):
        synthetic.oracle_scores(SMALL, [user], [length])
    with pytest.raises(DataError, match="history length -1"):
        synthetic.oracle_scores(SMALL, [user], [-1])
