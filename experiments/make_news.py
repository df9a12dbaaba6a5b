"""Writes a synthetic news log in MIND's format: behaviors.tsv and news.tsv.

    python experiments/make_news.py --out=DIR --users=500 --news=400 --seed=0
    dynrec prepare --source=mind:DIR --out=dataset

Its titles and abstracts are made of the words of one topic each. A user likes a few topics at a time, and which ones
drifts: now and then a new one takes the place of an old one. News is published over four weeks and shown while it is
new (half as often after a day and a half), so most of what a user clicks next was hardly seen before: only its text
tells what it is about. The first half of the weeks is each user's history, the second half the impressions, as in MIND.
Equal flags give equal files.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from dynrec_jax.data.synthetic.titles import ADJECTIVES, TOPICS

START = datetime(2019, 10, 18, tzinfo=UTC)
DAYS = 28.0
LOG_DAY = 14.0  # the log begins here; clicks before are history without times
HALF_LIFE = 1.5  # days
SHOWN = 20  # news in an impression
VISITS = 24  # on average, a user
LIKED = 3  # topics that a user likes at a time
DRIFT = 0.1  # chance that a liked topic is another one at the next visit
KEEN = 4.0  # how much more a liked topic draws, in logits
VERBS = (
    "opens",
    "returns",
    "divides experts",
    "wins a prize",
    "surprises",
    "closes early",
    "sells out",
    "is back",
)
PLACES = ("in the north", "by the sea", "downtown", "after years", "this week", "again", "for now", "at last")


@dataclass(frozen=True)
class News:
    """All news: topic, day of publication, title and abstract."""

    topic_N: np.ndarray
    day_N: np.ndarray
    titles: list[str]
    abstracts: list[str]


def write_news(out: Path, users: int, news: int, seed: int) -> None:
    """Writes both files into a new folder."""
    rng = np.random.default_rng(seed)
    world = make_world(rng, news)
    out.mkdir(parents=True)
    names = list(TOPICS)
    with (out / "news.tsv").open("w", encoding="utf-8", newline="\n") as file:
        for i in range(news):
            topic = names[world.topic_N[i]]
            section = f"section{world.topic_N[i] % 5}"
            link = f"https://news.invalid/N{i}.html"
            fields = (f"N{i}", section, topic, world.titles[i], world.abstracts[i], link, "[]", "[]")
            file.write("\t".join(fields) + "\n")
    lines = [line for user in range(users) for line in visits(rng, world, f"U{user}")]
    with (out / "behaviors.tsv").open("w", encoding="utf-8", newline="\n") as file:
        # MIND's lines are in no order of time or user.
        for number, line in enumerate(rng.permutation(len(lines)), 1):
            file.write(f"{number}\t{lines[line]}\n")


def make_world(rng: np.random.Generator, news: int) -> News:
    """Draws the news."""
    topic_N = rng.integers(len(TOPICS), size=news)
    day_N = np.sort(rng.uniform(-1.0, DAYS - 0.5, news))
    words = list(TOPICS.values())
    titles, abstracts = [], []
    for topic in topic_N:
        one, two, three = rng.permutation(words[topic])[:3]
        adjective, verb, place = (rng.choice(each) for each in (ADJECTIVES, VERBS, PLACES))
        titles.append(f"{adjective} {one} {verb} {place}")
        abstracts.append(f"What the {two} has to do with it, and why the {three} matters {place}.")
    return News(topic_N, day_N, titles, abstracts)


def visits(rng: np.random.Generator, world: News, user: str) -> list[str]:
    """A user's lines, but for their number."""
    days = np.sort(rng.uniform(0.0, DAYS, 2 + rng.poisson(VISITS - 2)))
    liked = rng.permutation(len(TOPICS))[:LIKED]
    history: list[str] = []
    unread_N = np.ones(len(world.titles), bool)
    lines = []
    for day in days:
        if rng.random() < DRIFT:
            others = np.setdiff1d(np.arange(len(TOPICS)), liked)
            liked[rng.integers(LIKED)] = rng.choice(others)
        shown = impression(rng, world, day, unread_N)
        if not len(shown):
            continue
        draw = KEEN * np.isin(world.topic_N[shown], liked) + rng.gumbel(size=len(shown))
        clicked = draw == draw.max()
        unread_N[shown[clicked]] = False
        if day < LOG_DAY:
            history += [f"N{i}" for i in shown[clicked]]
            continue
        time = START + timedelta(seconds=int(day * 86_400))
        marks = [f"N{i}-{int(is_clicked)}" for i, is_clicked in zip(shown, clicked, strict=True)]
        lines.append("\t".join((user, us_time(time), " ".join(history), " ".join(marks))))
    return lines


def impression(rng: np.random.Generator, world: News, day: float, unread_N: np.ndarray) -> np.ndarray:
    """News that is shown: out and unread, the newer the more often."""
    age_N = day - world.day_N
    there = np.flatnonzero((age_N >= 0) & unread_N)
    if not len(there):
        return there
    weight = 0.5 ** (age_N[there] / HALF_LIFE) + 1e-9
    return rng.choice(there, min(SHOWN, len(there)), replace=False, p=weight / weight.sum())


def us_time(time: datetime) -> str:
    """As in 11/15/2019 9:55:12 AM."""
    return f"{time.month}/{time.day}/{time.year} {time.hour % 12 or 12}:{time:%M:%S} {'AM' if time.hour < 12 else 'PM'}"


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--users", type=int, default=500)
    parser.add_argument("--news", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    if flags.out.exists():
        parser.error(f"--out={flags.out}: exists already; choose another folder")
    if flags.users < 1 or flags.news < SHOWN:
        parser.error(f"--users={flags.users} --news={flags.news}: expected a user and {SHOWN} news, or more")
    write_news(flags.out, flags.users, flags.news, flags.seed)


if __name__ == "__main__":
    main()
