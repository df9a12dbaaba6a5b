"""Writes the log as a real source would give it."""

from pathlib import Path

import numpy as np

from dynrec_jax.data.synthetic import world
from dynrec_jax.data.synthetic.histories import BLOCK, block_size, draw_block
from dynrec_jax.data.synthetic.spec import SyntheticSpec

LINES = 100_000  # written at a time


def write_log(spec: SyntheticSpec, folder: Path) -> None:
    """Writes `events.csv` (user,item,time) and `items.csv` (item_id,title,topic) into a folder that exists.

    Events of all users are in one sequence by time (seconds since 1970). Equal specs give equal bytes.
    """
    user, item, time = _events(spec)
    users, items = world.user_ids(spec), world.item_ids(spec)
    with (folder / "events.csv").open("w", encoding="utf-8", newline="\n") as file:
        file.write("user,item,time\n")
        for start in range(0, len(user), LINES):
            part = slice(start, start + LINES)
            lines = zip(user[part].tolist(), item[part].tolist(), time[part].tolist(), strict=True)
            file.writelines(f"{users[u]},{items[i]},{t}\n" for u, i, t in lines)
    names, topics = world.topic_names(spec), world.topic_of_items(spec).tolist()
    with (folder / "items.csv").open("w", encoding="utf-8", newline="\n") as file:
        file.write("item_id,title,topic\n")
        rows = zip(items, world.item_titles(spec), topics, strict=True)
        file.writelines(f"{item},{title},{names[topic]}\n" for item, title, topic in rows)


def _events(spec: SyntheticSpec) -> tuple[world.Ints, world.Ints, world.Ints]:
    """User number, item number and time of every event, by time, then by user."""
    users, items, times = [], [], []
    for block in range(-(-spec.users // BLOCK)):
        drawn = draw_block(spec, block)
        happened = np.arange(spec.longest) < drawn.lengths[:, None]
        numbers = block * BLOCK + np.arange(block_size(spec, block))
        users.append(np.repeat(numbers, drawn.lengths))
        items.append(world.world_of(spec).items[drawn.topics[happened], drawn.places[happened]])
        times.append(drawn.times[happened])
    user, item, time = np.concatenate(users), np.concatenate(items), np.concatenate(times)
    order = np.argsort(time, kind="stable")
    return user[order], item[order], time[order]
