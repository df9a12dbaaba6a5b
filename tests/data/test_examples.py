"""Splits, the draw rule and windows: pure functions, checked by hand and by what they promise."""

import numpy as np
import pytest

from dynrec_jax.data import examples
from dynrec_jax.errors import ConfigError


def test_leave_one_out_asks_for_the_last_two_events():
    splits = examples.leave_one_out(np.array([1, 2, 3, 7]))
    assert splits.train_end.tolist() == [1, 2, 1, 5]
    assert [each.tolist() for each in splits.validation] == [[2, 3], [1, 5]]
    assert [each.tolist() for each in splits.test] == [[2, 3], [2, 6]]


def test_who_has_two_targets_after_a_first_event_is_asked():
    # Of the last: the event before is the first of all, so there is no history to ask from.
    lengths, validation, test = np.array([9, 9, 9, 3]), np.array([4, -1, -1, 0]), np.array([7, 8, -1, 2])
    splits = examples.leave_one_out(lengths, validation, test)
    assert splits.train_end.tolist() == [4, 9, 9, 3]
    assert [each.tolist() for each in splits.test] == [[0], [7]]


def test_an_event_is_asked_for_after_another_and_of_users_with_three():
    asked = examples.Asked(np.array([0, 1, 1, 2]), np.array([1, 0, 2, 4]))
    found = examples.able(asked, np.array([2, 3, 5]))
    assert [each.tolist() for each in found] == [[1, 2], [2, 4]]


@pytest.mark.parametrize(("batch", "shards"), [(8, 4), (4, 8), (12, 4), (1, 64)])
def test_draw_k_is_of_shard_k_mod_s_at_position_k_div_s(batch: int, shards: int):
    seen = []
    for step in range(5):
        drawn = examples.draws(step, batch, shards)
        assert sorted(drawn.number) == list(range(step * batch, (step + 1) * batch))
        assert drawn.shard.tolist() == [k % shards for k in drawn.number]
        assert drawn.position.tolist() == [k // shards for k in drawn.number]
        seen += list(zip(drawn.shard.tolist(), drawn.position.tolist(), strict=True))
    assert len(set(seen)) == 5 * batch, "no draw comes twice"


@pytest.mark.parametrize(("batch", "shards"), [(16, 4), (4, 16), (8, 8)])
def test_processes_own_ranges_of_rows_whatever_their_number(batch: int, shards: int):
    for processes in (1, 2, 4):
        for step in range(4):
            shard_B = examples.draws(step, batch, shards).shard
            owner_B = shard_B * processes // shards
            # Each owner's rows lie together: the owner never falls from one row to the next, but where a batch
            # is smaller than the shards and starts over.
            assert (np.diff(owner_B) >= 0).all()


@pytest.mark.parametrize(
    ("batch", "shards", "good"), [(64, 64, True), (128, 64, True), (16, 64, True), (24, 64, False)]
)
def test_batch_and_shards_must_divide(batch: int, shards: int, good: bool):
    if good:
        examples.check_batch(batch, shards)
        return
    with pytest.raises(ConfigError, match="use a multiple of 64"):
        examples.check_batch(batch, shards)


def test_every_user_comes_once_in_each_epoch_of_its_shard():
    first_S, count_S = np.array([0, 5, 5]), np.array([5, 0, 3])
    by_epoch: dict[tuple[int, int], list[int]] = {}
    for step in range(10):
        drawn = examples.draws(step, 3, 3)
        users = examples.pick_users(7, drawn, first_S, count_S)
        for shard, position, user in zip(drawn.shard, drawn.position, users, strict=True):
            if shard == 1:
                assert user == -1, "a shard without users has none to give"
                continue
            by_epoch.setdefault((int(shard), int(position // count_S[shard])), []).append(int(user))
    for epoch in range(2):
        assert sorted(by_epoch[0, epoch]) == [0, 1, 2, 3, 4]
    for epoch in range(3):
        assert sorted(by_epoch[2, epoch]) == [5, 6, 7]
    assert by_epoch[0, 0] != by_epoch[0, 1] or by_epoch[2, 0] != by_epoch[2, 1], (
        "each epoch has its own order"
    )


def test_the_seed_changes_the_order():
    drawn = examples.draws(0, 64, 1)
    picked = [examples.pick_users(seed, drawn, np.array([0]), np.array([64])) for seed in (0, 0, 1)]
    assert np.array_equal(picked[0], picked[1])
    assert not np.array_equal(picked[0], picked[2])


def test_last_windows_end_where_training_ends():
    drawn = examples.draws(0, 4, 4)
    ends = np.array([0, 3, 9, 100])
    assert examples.window_ends(0, drawn, ends, 5, "last").tolist() == ends.tolist()


def test_random_windows_cover_all_of_a_long_history_evenly():
    drawn = examples.draws(0, 3000, 1)
    ends = examples.window_ends(3, drawn, np.full(3000, 14), 5, "random")
    counts = np.bincount(ends, minlength=15)
    assert not counts[:5].any(), "a window is never shorter than it could be"
    assert not counts[15:].any()
    # Ten places, 300 times each: five standard deviations.
    assert (np.abs(counts[5:15] - 300) < 5 * np.sqrt(300)).all()


def test_random_windows_of_short_histories_are_all_of_them():
    drawn = examples.draws(0, 4, 4)
    ends = np.array([0, 2, 4, 5])
    assert examples.window_ends(0, drawn, ends, 5, "random").tolist() == ends.tolist()


def test_random_windows_depend_on_seed_and_draw_alone():
    whole = examples.window_ends(0, examples.draws(0, 32, 4), np.full(32, 50), 5, "random")
    number = examples.draws(0, 32, 4).number
    again = {}
    for step in range(4):
        drawn = examples.draws(step, 8, 4)
        again.update(
            zip(drawn.number, examples.window_ends(0, drawn, np.full(8, 50), 5, "random"), strict=True)
        )
    assert whole.tolist() == [again[k] for k in number]
    other = examples.window_ends(1, examples.draws(0, 32, 4), np.full(32, 50), 5, "random")
    assert not np.array_equal(whole, other)
