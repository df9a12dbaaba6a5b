"""Baselines: what a model must beat. Each gives its scorers by setting, of which validation chooses one."""

from collections.abc import Callable, Mapping

from dynrec_jax.evaluate.baselines.content import content
from dynrec_jax.evaluate.baselines.ease import ease
from dynrec_jax.evaluate.baselines.item_knn import item_knn
from dynrec_jax.evaluate.baselines.learned import Learning, Scorer
from dynrec_jax.evaluate.baselines.lstm import lstm
from dynrec_jax.evaluate.baselines.popularity import popularity, recent_popularity
from dynrec_jax.evaluate.baselines.repeat_last import repeat_last

BASELINES: dict[str, Callable[[Learning], Mapping[str, Scorer]]] = {
    "popularity": popularity,
    "recent_popularity": recent_popularity,
    "repeat_last": repeat_last,
    "item_knn": item_knn,
    "ease": ease,
    "content": content,
    "lstm": lstm,
}
