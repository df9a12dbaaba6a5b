"""A raw log with planted drifting interests, whose best possible recommender is known.

Every item belongs to one topic. A user has a few interests, each in one topic, whose strengths rise and fall
smoothly; with slow trends that all users share they give the topic of the user's next event:
`p(z | u, t) = softmax_z(strength_uz(t) + trend_z(t))`. Within a topic, popular items are likelier, and so are
the successors of the item that the user took there last. An item is taken at most once.

All of it follows from the seed: `write_log` writes what a real source would give, and `oracle_scores`
regenerates the distribution that any of its events was drawn from.
"""

from dynrec_jax.data.synthetic.log import write_log
from dynrec_jax.data.synthetic.oracle import interests, oracle_scores
from dynrec_jax.data.synthetic.spec import SyntheticSpec, parse
from dynrec_jax.data.synthetic.world import item_ids, topic_names, topic_of_items, user_ids

__all__ = [
    "SyntheticSpec",
    "interests",
    "item_ids",
    "oracle_scores",
    "parse",
    "topic_names",
    "topic_of_items",
    "user_ids",
    "write_log",
]
