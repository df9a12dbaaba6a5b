"""The model that a config describes."""

from collections.abc import Sequence

import jax.numpy as jnp
import ml_collections

from dynrec_jax.data.event_types import target_weights
from dynrec_jax.models.abra import Abra
from dynrec_jax.models.bstm import Bstm, Towers
from dynrec_jax.models.ensemble import Ensemble
from dynrec_jax.models.item_encoder import ItemEncoder
from dynrec_jax.models.text_encoder import TextEncoder
from dynrec_jax.models.towers.tower import Tower
from dynrec_jax.models.user_encoder import Sight, UserEncoder

Model = Bstm | Ensemble


def make_bstm(
    config: ml_collections.ConfigDict,
    items: int,
    towers: Sequence[Tower] = (),
    text: TextEncoder | None = None,
    event_types: Sequence[str] = (),
) -> Model:
    """The model that a config describes.

    Args:
      config: of the run.
      items: N, the size of the catalogue.
      towers: what describes the items besides their id, as `towers.read_towers` gives it; none for ids alone.
      text: BERT, where it is trained with the rest.
      event_types: names of the events' types, by index from 1.

    Raises:
      ConfigError: the config names an event type that there is not.
    """
    fusion = config.item.fusion
    if fusion == "ensemble":
        own = _bstm(config, items, (), True, unseen=True, event_types=event_types)
        return Ensemble(own, _bstm(config, items, towers, False, text, event_types=event_types))
    towers = towers if fusion != "id" else ()
    return _bstm(config, items, towers, fusion != "text", text, event_types=event_types)


def _bstm(
    config: ml_collections.ConfigDict,
    items: int,
    towers: Sequence[Tower],
    ids: bool,
    text: TextEncoder | None = None,
    unseen: bool = False,
    event_types: Sequence[str] = (),
) -> Bstm:
    m = config.model
    sight = Sight(
        positions=m.positions,
        time=tuple(m.time),
        time_buckets=m.time_buckets,
        query_time=m.query_time,
        event_types=len(event_types) if m.events else 0,
        window=m.attention_window,
    )
    dtype = jnp.dtype(m.dtype)
    user = UserEncoder(
        max_length=config.data.max_length,
        layers=m.layers,
        heads=m.heads,
        block=m.block,
        feedforward=m.feedforward,
        dropout=m.dropout,
        dtype=dtype,
        sight=sight,
        interests=m.interests,
        remat=m.remat,
        scan_layers=m.scan_layers,
    )
    item = ItemEncoder(
        towers=tuple((tower.name, tower.make) for tower in towers),
        ids=ids,
        dim=m.dim,
        dtype=dtype,
        id_dropout=config.item.id_dropout,
        unseen=unseen or bool(towers),
    )
    abra = Abra(
        dim=m.dim,
        items=items,
        temperature=m.temperature,
        normalise=m.normalise,
        hops=m.hops,
        block_items=config.loss.block_items,
        block_positions=config.loss.block_positions,
        interests=m.interests,
        neighbours=m.neighbours,
    )
    return Bstm(
        towers=Towers(user=user, item=item),
        abra=abra,
        max_length=config.data.max_length,
        dtype=dtype,
        loss_kind=config.loss.kind,
        calibration=config.loss.calibration,
        forward_weight=m.forward_weight,
        backward_weight=m.backward_weight,
        alignment=config.loss.alignment,
        neighbours=config.loss.neighbours,
        shrinkage=m.shrinkage,
        event_weights=target_weights(config, event_types),
        shapes=tuple((name, width, kind) for tower in towers for name, width, kind in tower.shapes),
        text=text,
    )


MODELS = {"bstm": make_bstm}
