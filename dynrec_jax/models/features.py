"""What is known of all items, on the devices: read by towers on the host, laid out as the rows of item tables are."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from dynrec_jax.config import describes_items, serves_neighbours, tunes_text
from dynrec_jax.data.dataset import Dataset
from dynrec_jax.data.neighbours import Neighbours, read_neighbours
from dynrec_jax.models.encode import encode_items
from dynrec_jax.models.model import MODELS, Model
from dynrec_jax.models.neighbours import Near
from dynrec_jax.models.text_encoder import BERT, TEXT
from dynrec_jax.models.towers.ids import ID_TABLE, INDEX
from dynrec_jax.models.towers.kinds import read_towers
from dynrec_jax.models.towers.text import TextSource, text_source
from dynrec_jax.models.towers.tower import Described, Job, Tower, Values
from dynrec_jax.parallel.rules import constrain, sharding
from dynrec_jax.parallel.table import ids_of, rows_for, rows_of

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Items:
    """The items of a run and what describes them.

    Attributes:
      number: N.
      towers: what describes them besides their ids.
      text: what BERT reads, where it is trained with the rest; otherwise None.
      say: is told how far long work is.
      event_types: names of the events' types, by index from 1.
      neighbours: which items are near each other, where what is served depends on it.
    """

    number: int
    towers: tuple[Tower, ...] = ()
    text: TextSource | None = None
    say: Callable[[str], None] = lambda line: None
    event_types: tuple[str, ...] = ()
    neighbours: Neighbours | None = None
    _placed: dict[Mesh, dict[str, Array]] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    _near: dict[Mesh, Near] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def model(self, config: ml_collections.ConfigDict) -> Model:
        """The model of a config over these items."""
        encoder = None if self.text is None else self.text.encoder
        return MODELS[config.model.name](config, self.number, self.towers, encoder, self.event_types)

    def place(self, mesh: Mesh) -> dict[str, Array]:
        """What towers have read, [R, width] by name, on the devices, which hold it once for all who ask."""
        if mesh not in self._placed:
            found = {name: values for tower in self.towers for name, values in tower.values.items()}
            self._placed[mesh] = {name: place(values, self.number, mesh) for name, values in found.items()}
        return self._placed[mesh]

    def near(self, mesh: Mesh) -> Near | None:
        """Neighbours of all items, on the devices, which hold them once, where what is served depends on them."""
        if self.neighbours is None:
            return None
        if mesh not in self._near:
            self._near[mesh] = near_of(self.neighbours, mesh)
        return self._near[mesh]

    def encoded(self, params: Any, mesh: Mesh, into: dict[str, Array] | None = None) -> dict[str, Array]:
        """Vectors of all texts by the BERT that is trained, [R, E]; empty where none is.

        `into` is what an earlier call gave: it is written over, and there is no second one.
        """
        if self.text is None:
            return {}
        weights = params.get("text", params)[BERT]
        rows, width = rows_for(self.number), self.text.encoder.width
        empty, put = _programs(rows, width, mesh)
        with jax.set_mesh(mesh):
            cache_RxE = into[TEXT] if into else empty()
            blocks = encode_items(
                self.text.encoder, weights, self.text.ids, self.text.lengths, mesh, self.say
            )
            for items, vectors in blocks:
                cache_RxE = put(cache_RxE, np.asarray(rows_of(items, rows), np.int32), vectors)
        return {TEXT: cache_RxE}


def read_items(
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    folder: Path | None = None,
    new: pa.Table | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Items:
    """The items that a config describes.

    Args:
      config: of the run.
      dataset: that it was, or will be, trained on.
      folder: the run folder.
      new: items that came later, rows as in `Dataset.items_table`; they follow the dataset's own.
      say: is told how far long work is.

    Raises:
      ConfigError: the dataset lacks what a tower is made of.
      DataError: a file is not what it must be.
    """
    types = tuple(dataset.event_types)
    near = None
    if serves_neighbours(config) and folder is not None:
        near = read_neighbours(folder, dataset.items, dataset.items + (0 if new is None else new.num_rows))
    if not describes_items(config):
        return Items(dataset.items, event_types=types, neighbours=near)
    job = Job(config, dataset, dataset.items_table(), folder, say)
    towers, text = read_towers(job), text_source(job) if tunes_text(config) else None
    if new is None:
        return Items(dataset.items, tuple(towers), text, say, types, near)
    later = dataclasses.replace(job, items=new)
    both = zip(towers, read_towers(later), strict=True)
    towers = [tower.followed_by(other) for tower, other in both]
    if text is not None:
        text = text.followed_by(text_source(later))
    return Items(dataset.items + new.num_rows, tuple(towers), text, say, types, near)


@functools.lru_cache(maxsize=4)
def _programs(rows: int, width: int, mesh: Mesh) -> tuple[Callable[[], Array], Callable[..., Array]]:
    """What makes an empty table [R, E], and what puts vectors into rows of it."""
    where = sharding(mesh, "items", None)
    empty = jax.jit(lambda: jnp.zeros((rows, width)), out_shardings=where)
    put = jax.jit(
        lambda cache, row, vectors: cache.at[row].set(vectors), out_shardings=where, donate_argnums=0
    )
    return empty, put


def near_of(neighbours: Neighbours, mesh: Mesh) -> Near:
    """Neighbours of all items, on the devices as the rows of item tables are."""
    return Near(*(place(Values(array.reshape(len(array), -1)), len(array), mesh) for array in neighbours))


def place(values: Values, number: int, mesh: Mesh) -> Array:
    """Values of all items, [R, width], on the devices as the rows of item tables are; 0 where no item is."""
    rows = rows_for(number)

    def piece(index: Any) -> np.ndarray:
        id_R = ids_of(np.arange(rows, dtype=np.int64)[index[0]], rows)
        real_R = (id_R >= 1) & (id_R <= number)
        found = np.zeros((len(id_R), values.width), values.kind)
        found[real_R] = values.rows(id_R[real_R] - 1)
        return found

    return jax.make_array_from_callback((rows, values.width), sharding(mesh, "items", None), piece)


def described_rows(known: Described, tables: dict[str, Array], rows: int) -> Described:
    """What describes every row of a table, for `catalogue`."""
    whole = {**known, **({ID_TABLE: tables[ID_TABLE]} if ID_TABLE in tables else {})}
    if not known:
        return whole
    index_Rx1 = constrain(ids_of(jnp.arange(rows, dtype=jnp.int32), rows)[:, None], "items", None)
    return {**whole, INDEX: index_Rx1}
