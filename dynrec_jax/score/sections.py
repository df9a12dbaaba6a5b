"""What a job writes: lists for users, lists for items, vectors of either; each in parts that are made one by one."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from dynrec_jax.data.arrow import to_arrow
from dynrec_jax.data.cache import Histories
from dynrec_jax.data.pipeline import make_splits
from dynrec_jax.evaluate.beyond import popularity_groups
from dynrec_jax.evaluate.only import Only
from dynrec_jax.evaluate.popular import popularity_counts
from dynrec_jax.evaluate.recommender import Lists, NonFiniteScores, Recommender
from dynrec_jax.parallel.mesh import own_rows, place_rows
from dynrec_jax.parallel.processes import Processes
from dynrec_jax.parallel.rules import constrain
from dynrec_jax.parallel.table import lookup
from dynrec_jax.parallel.topk import top_k
from dynrec_jax.score.options import ITEMS, LISTS, NEIGHBOURS, USERS, ScoreOptions
from dynrec_jax.score.queries import Queries
from dynrec_jax.score.rerank import Rerank
from dynrec_jax.score.several import lists_of
from dynrec_jax.score.tables import of_lists, of_vectors
from dynrec_jax.workdir import Run

GROUP_ITEMS = 65_536  # items of a part at most
Array = jax.Array
# What computes a part, with all processes together (None: nothing for this one), and gives what makes its table.
Maker = Callable[[int | None], Callable[[], pa.Table]]


@dataclasses.dataclass(frozen=True)
class Section:
    """Parts of one kind.

    Attributes:
      name: what is in them, one of `options.WHAT`.
      unit: what their rows are, "users" or "items".
      rows: of each part.
      prepare: makes what makes parts; the devices begin to work here.
    """

    name: str
    unit: str
    rows: list[int]
    prepare: Callable[[], Maker]


def lists_section(
    runs: Sequence[Run], options: ScoreOptions, queries: Queries, only: Only, processes: Processes
) -> Section:
    """Recommendations for users."""
    items = runs[0].item_ids

    def prepare() -> Maker:
        rerank = processes.agree(lambda: _rerank(runs[0], options))
        lists = lists_of(
            runs,
            options.k,
            options.filter_seen,
            processes,
            only,
            options.shares,
            rerank,
            options.compression,
            options.cache_dir,
        )

        def make(part: int | None) -> Callable[[], pa.Table]:
            users, ends = _nobody() if part is None else queries.parts[part]
            made = above(lists(queries.source, users, ends), options.min_score)
            return lambda: of_lists("user_id", queries.ids(users), made, items)

        return make

    return Section(LISTS, "users", [len(users) for users, _ in queries.parts], prepare)


def _rerank(run: Run, options: ScoreOptions) -> Rerank | None:
    if not options.calibrate:
        return Rerank(options.pool, options.diversify) if options.diversify else None
    stored = Histories(run.dataset, options.cache_dir or run.config.data.cache_dir)
    counts = popularity_counts(stored, make_splits(stored, run.config), run.config)["popularity"]
    return Rerank(options.pool, calibrate=options.calibrate, group_N=popularity_groups(counts))


def users_section(run: Run, queries: Queries, processes: Processes) -> Section:
    """Vectors of users."""

    def prepare() -> Maker:
        vectors = _recommender(run, 1, processes).prepare_vectors(run.params, run.tables)

        def make(part: int | None) -> Callable[[], pa.Table]:
            users, ends = _nobody() if part is None else queries.parts[part]
            made = vectors(queries.source, users, ends)
            return lambda: of_vectors("user_id", queries.ids(users), made)

        return make

    return Section(USERS, "users", [len(users) for users, _ in queries.parts], prepare)


def items_section(run: Run, allowed: np.ndarray | None, processes: Processes) -> Section:
    """Vectors of items, as users' vectors are multiplied with them."""
    parts, ids = _items_in_parts(run, allowed), run.item_ids

    def prepare() -> Maker:
        recommender = _recommender(run, 1, processes)
        _, table_RxD = recommender.vectors(run.params, run.tables)
        rows = jax.jit(lambda table_RxD, item_B: lookup(table_RxD, item_B[:, None])[:, 0])

        def make(part: int | None) -> Callable[[], pa.Table]:
            items = _none() if part is None else parts[part]
            (made,) = _by_batches(recommender, processes, items, lambda item_B: (rows(table_RxD, item_B),))
            if not np.isfinite(made).all():
                raise NonFiniteScores("item vectors are not finite")
            return lambda: of_vectors("item_id", ids.take(to_arrow(items - 1)), made)

        return make

    return Section(ITEMS, "items", [len(items) for items in parts], prepare)


def neighbours_section(run: Run, k: int, allowed: np.ndarray | None, processes: Processes) -> Section:
    """For each item the `k` others whose vectors have the highest cosine with its own."""
    parts, ids = _items_in_parts(run, None), run.item_ids
    abra = run.model.abra

    def prepare() -> Maker:
        recommender = _recommender(run, k, processes)
        _, table_RxD = recommender.vectors(run.params, run.tables)
        allowed_Rx1 = Only(allowed).place(run.mesh)
        with jax.set_mesh(run.mesh):
            unit_RxD = jax.jit(_unit)(table_RxD)

        @jax.jit
        def nearest(unit_RxD: Array, item_B: Array) -> tuple[Array, Array]:
            q_BxD = lookup(unit_RxD, item_B[:, None])[:, 0]
            found = top_k(
                q_BxD,
                unit_RxD,
                item_B[:, None],
                k=k,
                items=abra.items,
                scale=1.0,
                rows=abra.block_items,
                allowed_Rx1=allowed_Rx1,
            )
            return constrain(found[0], "batch", None), constrain(found[1], "batch", None)

        def make(part: int | None) -> Callable[[], pa.Table]:
            items = _none() if part is None else parts[part]
            made = Lists(
                *_by_batches(recommender, processes, items, lambda item_B: nearest(unit_RxD, item_B))
            )
            if np.isnan(made.scores).any():
                raise NonFiniteScores("item vectors are not finite")
            return lambda: of_lists("item_id", ids.take(to_arrow(items - 1)), made, ids)

        return make

    return Section(NEIGHBOURS, "items", [len(items) for items in parts], prepare)


def above(lists: Lists, least: float | None) -> Lists:
    """Lists without the items whose score is lower than `least`."""
    if least is None:
        return lists
    kept = lists.scores >= least
    return Lists(np.where(kept, lists.ids, 0), np.where(kept, lists.scores, -np.inf).astype(np.float32))


def _recommender(run: Run, k: int, processes: Processes) -> Recommender:
    batch = run.config.evaluation.batch_size
    return Recommender(run.model, run.mesh, batch, k, False, processes, run.items)


def _items_in_parts(run: Run, allowed: np.ndarray | None) -> list[np.ndarray]:
    items = np.arange(1, run.items.number + 1) if allowed is None else np.flatnonzero(allowed)
    return np.split(items, range(GROUP_ITEMS, len(items), GROUP_ITEMS))


def _unit(table_RxD: Array) -> Array:
    norm_Rx1 = jnp.linalg.norm(table_RxD, axis=-1, keepdims=True)
    return table_RxD / jnp.where(norm_Rx1 > 0, norm_Rx1, 1.0)


def _by_batches(
    recommender: Recommender,
    processes: Processes,
    items: np.ndarray,
    made: Callable[[Array], tuple[Array, ...]],
) -> tuple[np.ndarray, ...]:
    """What a program makes of some items, batch by batch, each array `[len(items), …]`; all processes together."""
    size = recommender.batch_size
    found: list[tuple[np.ndarray, ...]] = []
    for start in range(0, max(processes.exchange(len(items))) or 1, size):
        item_B = items[start : start + size].astype(np.int32)
        with jax.set_mesh(recommender.mesh):
            arrays = made(place_rows(recommender.mesh, np.pad(item_B, (0, size - len(item_B)))))
        found.append(tuple(own_rows(array)[: len(item_B)] for array in arrays))
    return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))


def _none() -> np.ndarray:
    return np.zeros(0, np.int64)


def _nobody() -> tuple[np.ndarray, np.ndarray]:
    return _none(), _none()
