"""Runs that train BERT with the rest, as a user starts them: when vectors are made anew, what stays fixed, resuming."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from dynrec_jax.data.dataset import Dataset, open_dataset
from dynrec_jax.data.tokens import load_tokenizer, tokenize
from dynrec_jax.models.bert import from_pretrained, pool
from dynrec_jax.models.bert_config import read_config
from dynrec_jax.models.bert_weights import read_weights

from .. import described
from ..commands import experiment
from ..invariants import runs
from ..invariants.test_resume_every_step import as_of

WORDS = ["red", "blue", "lamp", "chair", "glass", "wood", "old", "new"]
STEPS, REFRESH = 11, 4
ITEMS = 20
RUN: dict[str, Any] = {
    "item__fusion": "text",
    "item__text": ("title",),
    "item__text_mode": "tuned",
    "item__text_from": 1,
    "item__text_tokens": 12,
    "item__text_refresh": REFRESH,
    "item__text_rate": 1.0,
    "item__text_dropout": 0.0,  # so that vectors have not moved at all where they have just been made
    "loss__kind": "sampled",
    "model__dropout": 0.2,
    "model__backward_weight": 0.0,
    "data__windows": "random",
    "data__max_length": 6,
    # A later split than there is data: nobody is asked for anything, so no time is spent on evaluation.
    "evaluation__metric": "mrr",
    "evaluation__ks": (1, 5),
    "train__evaluate_every": 0,
    "train__weight_decay": 0.3,
    "train__warmup": 0.0,
    "train__steps": STEPS,
    "train__checkpoint_every": 1,
    "train__keep_last": STEPS,
    "logging__every": 1,
}


class World(NamedTuple):
    """A run that nobody stopped, and what it was started from.

    Attributes:
      server: starts others.
      config: its experiment file.
      bert: the folder of its BERT.
      whole: its run folder.
      dataset: its dataset.
    """

    server: runs.Server
    config: Path
    bert: Path
    whole: Path
    dataset: Dataset


def titles() -> list[str]:
    """Two to five words each; the last two items have none."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 2 + n % 4)) for n in range(ITEMS - 2)] + ["", ""]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("text_runs")
    rng = np.random.default_rng(1)
    # Two events a user: all of them train, and nobody is evaluated.
    log = [" ".join([f"u{user}", *(f"i{n:02d}" for n in rng.integers(0, ITEMS, 2))]) for user in range(40)]
    log += [f"v{n} i{n:02d} i{n:02d}" for n in range(ITEMS)]
    rows = [{"item_id": f"i{n:02d}", "title": title} for n, title in enumerate(titles())]
    made = described.dataset(folder / "made", log, rows)
    bert = described.bert_folder(folder / "bert", titles())
    config = experiment(folder / "experiment.py", made.path, item__bert=str(bert), **RUN)
    with runs.serving(folder / "compiled") as server:
        server.train(config, folder / "whole").finish()
        yield World(server, config, bert, folder / "whole", open_dataset(made.path))


@functools.cache
def read(checkpoint: Path) -> dict[str, np.ndarray]:
    return runs.leaves(checkpoint)


def leaves(world: World, step: int) -> dict[str, np.ndarray]:
    return read(world.whole / "checkpoints" / str(step))


def cache(world: World, step: int) -> np.ndarray:
    """[N, E], the text's vectors as they stand after a step."""
    (found,) = [x for name, x in leaves(world, step).items() if "cache" in name]
    return found[1 : ITEMS + 1]


def weights(world: World, step: int) -> dict[str, np.ndarray]:
    """BERT's."""
    found = {
        name: x for name, x in leaves(world, step).items() if name.startswith("model") and "['bert']" in name
    }
    return {name.split("['bert']")[1]: x for name, x in found.items()}


def first_weights(world: World) -> dict[str, np.ndarray]:
    tree = read_weights(world.bert, read_config(world.bert))
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@functools.partial(jax.jit, static_argnums=0)
def encode(module: Any, params: Any, ids: Any, mask: Any) -> Any:
    return pool(module.apply({"params": params}, ids, mask), mask, "mean")


def by_hand(world: World, step: int) -> np.ndarray:
    """Vectors of all texts by the weights of a step, without what the run itself makes of them."""
    module, variables = from_pretrained(world.bert)
    params = variables["params"]
    if step:
        found = weights(world, step)
        params = jax.tree_util.tree_map_with_path(lambda path, _: found[jax.tree_util.keystr(path)], params)
    ids, lengths = tokenize(load_tokenizer(world.bert), titles(), 12)
    mask = (np.arange(12) < lengths[:, None]).astype(np.int32)
    return np.asarray(encode(module, params, ids, mask))


def test_vectors_of_all_items_are_made_anew_at_their_turn_alone(world):
    for step in range(1, STEPS + 1):
        made_at = (step - 1) // REFRESH * REFRESH  # with the weights before that step
        if made_at != step - 1:
            np.testing.assert_array_equal(cache(world, step), cache(world, step - 1))
        if step in (1, REFRESH + 1, 2 * REFRESH + 1):
            expected = by_hand(world, made_at)
            assert not expected[-2:].any()
            np.testing.assert_allclose(cache(world, step), expected, rtol=1e-4, atol=2e-5)
            if step > 1:
                assert np.abs(cache(world, step) - cache(world, step - 1)).max() > 1e-2


def test_how_far_vectors_have_moved_is_logged(world):
    moved = [line["text_moved"] for line in runs.lines(world.whole)]
    assert len(moved) == STEPS
    for step, value in enumerate(moved):
        if step % REFRESH:
            assert value > 1e-5, step
        else:
            assert abs(value) < 1e-6, step


def test_what_lies_below_the_first_trained_layer_stays_as_it_is(world):
    """Bit for bit, with weight decay on; all else has moved."""
    first, last = first_weights(world), weights(world, STEPS)
    assert first.keys() == last.keys()
    fixed = [name for name in first if not name.startswith("['layer_1']")]
    assert any("['layer_0']" in name for name in fixed)
    assert any("['word']" in name for name in fixed)
    for name in first:
        if name in fixed:
            assert first[name].tobytes() == last[name].tobytes(), name
        elif not name.endswith("['key']['bias']"):  # the same for all keys changes nothing
            assert np.abs(first[name] - last[name]).max() > 1e-4, name


@pytest.mark.parametrize(
    "step", [6, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_between_two_refreshes_as_if_it_had_never_stopped(step, world, tmp_path):
    """Bit for bit, vectors of all texts too; also where one is next. The BERT of the start is not needed."""
    shutil.move(world.bert, world.bert.with_name("away"))
    try:
        resumed = tmp_path / f"from{step}"
        as_of(step, world.whole, resumed)
        shutil.copytree(world.whole / "bert", resumed / "bert")
        world.server.train(world.config, resumed, train__checkpoint_every=1000).finish()
        told = f"from step {step}"
        assert runs.lines(resumed) == runs.lines(world.whole), told
        assert runs.saved(resumed) == [*range(1, step + 1), STEPS], told
        last = Path("checkpoints", str(STEPS))
        runs.assert_same_arrays(resumed / last, world.whole / last, told)
        clocks = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
        whole = [json.loads(line) for line in (world.whole / "metrics.jsonl").read_text().splitlines()]
        assert clocks[:step] == whole[:step]
        assert clocks[step] != whole[step], "it did start from there"
    finally:
        shutil.move(world.bert.with_name("away"), world.bert)
