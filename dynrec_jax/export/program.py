"""What a run recommends with, as one program that needs nothing else of this package: StableHLO, by `jax.export`.

A program takes weights by name and inputs by name, and has neither inside: one file of numbers serves them all. Its
batch is of any size. What it computes is what `evaluate.recommender` does on one device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dynrec_jax.batch import History
from dynrec_jax.data.cache import Histories
from dynrec_jax.evaluate.recommender import NonFiniteScores, Recommender
from dynrec_jax.models.ensemble import Ensemble
from dynrec_jax.models.neighbours import Near, last_items
from dynrec_jax.parallel.table import lookup
from dynrec_jax.workdir import Run

Array = jax.Array
Named = dict[str, Array]  # weights or inputs by name
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Names of weights besides those of the user encoder, which lie below `USERS`. Rows of item i: `table.rows_of(i, R)`.
USERS, VECTORS, TABLE, NEAR_IDS, NEAR_WEIGHTS = "users", "vectors", "table", "near/ids", "near/weights"
SEEN = "seen"


class Served:
    """The pure functions that serve a run, of weights and inputs by name.

    Inputs are int32: `items` [B, L], oldest first, padded on the right by 0, L being the model's longest history;
    where the model looks at them `times` [B, L] and `asked` [B], in seconds since the dataset's first event, and
    `events` [B, L], types from 1; and `seen` [B, M], items to leave out, padded by 0, where seen items are filtered.

    Attributes:
      run: the trained model.
      k: length of the lists.
      filter_seen: whether `seen` is asked for.
    """

    def __init__(self, run: Run, k: int, filter_seen: bool):
        self.run = run
        self.k = k
        self.filter_seen = filter_seen
        self._model = run.model
        self._recommender = Recommender(run.model, run.mesh, 1, k, filter_seen, items=run.items)

    def weights(self) -> dict[str, np.ndarray]:
        """What the functions need of the run, on the host, by name.

        Raises:
          NonFiniteScores: an item vector is not finite.
        """
        vectors_RxD, table_RxD = self._recommender.vectors(self.run.params, self.run.tables)
        named = {VECTORS: vectors_RxD, **flatten_dict({USERS: self._of_users()}, sep="/")}
        if self._model.normalises:
            named[TABLE] = table_RxD
        near = self._recommender.near
        if near is not None:
            named |= {NEAR_IDS: near.ids, NEAR_WEIGHTS: near.weights}
        found = {name: np.asarray(leaf) for name, leaf in jax.device_get(named).items()}
        if not all(np.isfinite(leaf).all() for leaf in found.values()):
            raise NonFiniteScores("weights or item vectors are not finite")
        return found

    def _of_users(self) -> Any:
        """The dense weights without those of items, whose vectors are ready."""
        params = self.run.params
        if isinstance(self._model, Ensemble):
            return {name: {"user": params[name]["user"]} for name in self._model.parts}
        return {"user": params["user"]}

    def queries(self, weights: Named, inputs: Named) -> Array:
        """What is scored against the items, float32[B, I · D] of I interests, one behind the other."""
        history = History(**{name: inputs.get(name) for name in History._fields})
        params = unflatten_dict(
            {
                name.removeprefix(f"{USERS}/"): leaf
                for name, leaf in weights.items()
                if name.startswith(USERS)
            },
            sep="/",
        )
        u_BxD = self._model.last_vector(params, lookup(weights[VECTORS], history.items), history)
        abra = self._model.abra
        # All users are a block: of how many there will be nothing is known, not even whether it is fewer than a block.
        blocks = abra.blocks._replace(positions=history.items.shape[0])
        return abra.query(u_BxD, weights.get(TABLE, weights[VECTORS]), blocks=blocks)

    def lists(self, weights: Named, inputs: Named) -> tuple[Array, Array]:
        """ids int32[B, k], best first, and scores float32[B, k]; 0 and -inf behind the last item to be had."""
        items_BxL = inputs["items"]
        near = None
        if NEAR_IDS in weights:
            # Events count where vectors are drawn to their neighbours', which these are already.
            ids_RxM = weights[NEAR_IDS]
            near = Near(ids_RxM, weights[NEAR_WEIGHTS], jnp.zeros((ids_RxM.shape[0], 1), jnp.int32))
        seen_BxM = inputs.get(SEEN)
        if seen_BxM is None:
            seen_BxM = jnp.zeros((items_BxL.shape[0], 1), jnp.int32)
        raised = self._recommender.raised(near, last_items(items_BxL))
        table_RxD = weights.get(TABLE, weights[VECTORS])
        return self._model.abra.best(self.queries(weights, inputs), table_RxD, seen_BxM, self.k, raised)

    def nearest(self, weights: Named, inputs: Named) -> Array:
        """The attention's k items, int32[B, I · k], each interest's behind the other: no counts, nothing left out."""
        table_RxD = weights.get(TABLE, weights[VECTORS])
        q_PxD = self.queries(weights, inputs).reshape(-1, table_RxD.shape[1])
        ids_PxK, _ = self._model.abra.best(
            q_PxD, table_RxD, jnp.zeros((q_PxD.shape[0], 1), jnp.int32), self.k
        )
        return ids_PxK.reshape(inputs["items"].shape[0], -1)

    def inputs_of_queries(self, users: Any, make: Callable[..., Any]) -> dict[str, Any]:
        """The inputs of `queries` for so many users, each as `make(*shape)` gives it."""
        shapes = self._model.sight.shapes(users, self._model.max_length, make)._asdict()
        return {name: shape for name, shape in shapes.items() if shape is not None}

    def inputs_of_lists(self, users: Any, seen: Any, make: Callable[..., Any]) -> dict[str, Any]:
        """The inputs of `lists`."""
        given = self.inputs_of_queries(users, make)
        return {**given, SEEN: make(users, seen)} if self.filter_seen else given

    def read(self, histories: Histories, users_B: np.ndarray, ends_B: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs of `queries` from stored histories: events before number `end` of each user."""
        found = {
            **histories.windows(users_B, ends_B, self._model.max_length)._asdict(),
            "asked": histories.asked(users_B, ends_B),
        }
        return {name: found[name] for name in self.inputs_of_queries(1, lambda *shape: shape)}

    def items(self, weights: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows of the table, float32[C, D], whose inner product with a query is the score."""
        vectors = weights.get(TABLE, weights[VECTORS])[rows]
        return np.asarray(vectors * np.float32(self._model.abra.scale), np.float32)


def export_program(
    function: Callable[[Named, Named], Any],
    weights: dict[str, np.ndarray],
    inputs: dict[str, jax.ShapeDtypeStruct],
    platforms: Sequence[str],
) -> jax.export.Exported:
    """Lowers a function of `Served` for some platforms.

    Args:
      function: of weights and inputs by name.
      weights: as `Served.weights` gives them.
      inputs: shapes by name; sizes may be symbols of `jax.export.symbolic_shape`.
      platforms: some of `PLATFORMS`.
    """
    held = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    # Arguments that are not read stay too: whoever calls it need not know which they are.
    whole = jax.jit(function, keep_unused=True)
    return jax.export.export(whole, platforms=list(platforms))(held, inputs)


def arguments(named: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, shape and type of each of an argument's arrays, in the order in which a program takes them.

    A letter stands for a size that is free: `b` users, `m` seen items.
    """
    return [
        {
            "name": name,
            "shape": [size if isinstance(size, int) else str(size) for size in leaf.shape],
            "dtype": jnp.dtype(leaf.dtype).name,
        }
        for name, leaf in sorted(named.items())
    ]
