"""The page of a run: metrics, curves, the drift protocol and a few users' interests, in one file without a script."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from dynrec_jax.report.svg import Point, areas, bins, lines

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
h3 { margin: 1em 0 0; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .15em .8em; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #f6f6f6; }
th { border-bottom: 1px solid #999; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 1em 2em; }
figure { margin: 0; } figcaption { font-weight: 600; } .about { color: #666; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #333; } .grid { stroke: #e5e5e5; }
""".strip()
# Nothing from outside, and no script: what a page of data needs none of.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class UserStory(NamedTuple):
    """One user's interests over time.

    Attributes:
      user: id.
      times: P moments, seconds since 1970, ascending; of the user's events.
      shares: the model's share of each topic after each event, P each, those of "all others" last; empty where the
        items have no topics.
      planted: the true ones likewise, where the source knows them.
      ticks: places on the axis of time, and what stands there.
      events: when, and what: titles of the last items, the latest first.
      next: titles of what is recommended now, best first.
    """

    user: str
    times: Sequence[float]
    shares: Mapping[str, Sequence[float]]
    planted: Mapping[str, Sequence[float]]
    ticks: Sequence[tuple[float, str]]
    events: Sequence[tuple[str, str]]
    next: Sequence[str]


def page(
    title: str,
    facts: Mapping[str, str],
    evaluation: Mapping[str, Any],
    drift: Mapping[str, Any],
    log: Sequence[Mapping[str, float]],
    users: Sequence[UserStory],
) -> str:
    """The HTML text.

    Args:
      title: of the page.
      facts: about the run, by name.
      evaluation: as `dynrec evaluate` writes it.
      drift: as `dynrec evaluate --drift` writes it.
      log: lines of the run's `metrics.jsonl`.
      users: whose interests are shown.
    """
    body = [
        f"<h1>{escape(title)}</h1>",
        _facts(facts),
        "<h2>Metrics</h2>",
        _metrics(evaluation),
        "<h2>Training</h2>",
        _charts(_curves(log)),
        "<h2>Where it is good, and where it is not</h2>",
        '<p class="about">Bars are 95 % intervals: users drawn with replacement.</p>',
        _charts(
            [
                (way["title"], _slices(way))
                for way in drift["slices"]
                if any(b["metrics"] for b in way["bins"])
            ]
        ),
        *(["<h2>Interests over time</h2>"] if users else []),
        *(_story(story) for story in users),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        # An icon of its own: a browser would ask for one otherwise.
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _facts(facts: Mapping[str, str]) -> str:
    told = " · ".join(f"{escape(name)}: {escape(value)}" for name, value in facts.items())
    return f'<p class="about">{told}</p>'


def _metrics(evaluation: Mapping[str, Any]) -> str:
    columns = {"model": evaluation, **evaluation["baselines"]}
    if "oracle" in evaluation:
        columns["oracle"] = evaluation["oracle"]
    names = [name for name in evaluation if "@" in name or name == "mrr"]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *columns))
    rows = []
    for name in names:
        values = "".join(f"<td>{column[name]:.4f}</td>" for column in columns.values())
        rows.append(f"<tr><td>{escape(name)}</td>{values}</tr>")
    protocol = ", ".join(f"{name} {value}" for name, value in evaluation["protocol"].items())
    return f'<table><tr>{head}</tr>{"".join(rows)}</table><p class="about">Protocol: {escape(protocol)}.</p>'


def _curves(log: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    def of(key: str) -> list[Point]:
        return [Point(line["step"], line[key]) for line in log if line.get(key) is not None]

    found = [("Loss", lines({"training": of("loss")}, "step", "loss", from_zero=False))] if of("loss") else []
    measured = {
        key.removeprefix("validation/") for line in log for key in line if key.startswith("validation/")
    }
    shown: dict[str, Sequence[Point]] = {
        name: of(f"validation/{name}") for name in ("ndcg@10", "recall@10", "mrr") if name in measured
    }
    return [*found, ("Validation", lines(shown, "step", "metric"))] if shown else found


def _slices(way: Mapping[str, Any]) -> str:
    shown = [each for each in way["bins"] if each["metrics"]]
    metric = next(iter(next(iter(shown[0]["metrics"].values()))))
    series: dict[str, list[Point]] = {}
    for name in shown[0]["metrics"]:
        values = [each["metrics"][name][metric] for each in shown]
        series[name] = [Point(0.0, value["mean"], value["low"], value["high"]) for value in values]
    return bins(series, [f"{each['label']} ({each['queries']:,})" for each in shown], metric)


def _charts(charts: Sequence[tuple[str, str]]) -> str:
    figures = [f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in charts]
    return f'<div class="charts">{"".join(figures)}</div>'


def _story(story: UserStory) -> str:
    charts = []
    for title, shares in (("planted interests", story.planted), ("what the model infers", story.shares)):
        if shares:
            charts.append((title, areas(story.times, shares, story.ticks, "share")))
    rows = "".join(f"<tr><td>{escape(what)}</td><td>{escape(when)}</td></tr>" for when, what in story.events)
    names = "".join(f"<li>{escape(title)}</li>" for title in story.next)
    return (
        f"<h3>User {escape(story.user)}</h3>{_charts(charts)}"
        f"<table><tr><th>last events</th><th>when</th></tr>{rows}</table>"
        f"<p>Recommended now:</p><ol>{names}</ol>"
    )
