"""The model that a config describes."""

from collections.abc import Sequence

import jax.numpy as jnp
import ml_collections

from dynrec_jax.models.abra import Abra
from dynrec_jax.models.bstm import Bstm, Towers
from dynrec_jax.models.ensemble import Ensemble
from dynrec_jax.models.item_encoder import ItemEncoder
from dynrec_jax.models.text_encoder import TextEncoder
from dynrec_jax.models.towers.tower import Tower
from dynrec_jax.models.user_encoder import UserEncoder

Model = Bstm | Ensemble


def make_bstm(
    config: ml_collections.ConfigDict,
    items: int,
    towers: Sequence[Tower] = (),
    text: TextEncoder | None = None,
) -> Model:
    """The model that a config describes.

    Args:
      config: of the run.
      items: N, the size of the catalogue.
      towers: what describes the items besides their id, as `towers.read_towers` gives it; none for ids alone.
      text: BERT, where it is trained with the rest.
    """
    fusion = config.item.fusion
    if fusion == "ensemble":
        return Ensemble(
            _bstm(config, items, (), True, unseen=True), _bstm(config, items, towers, False, text)
        )
    return _bstm(config, items, towers if fusion != "id" else (), fusion != "text", text)


def _bstm(
    config: ml_collections.ConfigDict,
    items: int,
    towers: Sequence[Tower],
    ids: bool,
    text: TextEncoder | None = None,
    unseen: bool = False,
) -> Bstm:
    m = config.model
    dtype = jnp.dtype(m.dtype)
    user = UserEncoder(
        max_length=config.data.max_length,
        layers=m.layers,
        heads=m.heads,
        block=m.block,
        feedforward=m.feedforward,
        dropout=m.dropout,
        dtype=dtype,
        time_buckets=0,
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
        shapes=tuple((name, width, kind) for tower in towers for name, width, kind in tower.shapes),
        text=text,
    )


MODELS = {"bstm": make_bstm}
