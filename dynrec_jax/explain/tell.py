"""An explanation for the eye: a table in the terminal, and a picture."""

import datetime
import io
import warnings

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from dynrec_jax.explain.explainer import Event, Explanation
from dynrec_jax.explain.faithful import MEASURES, Faithfulness

FOR, AGAINST, REST, INK = "#0072B2", "#D55E00", "#D9D9D9", "#333333"
LONGEST = 48  # letters of a title in the picture


def table_of(explained: Explanation, top: int) -> Table:
    """A row an event, the largest share first, and one for the rest. Words of the data are shown as they are."""
    shown = explained.events[:top]
    table = Table(
        title=Text(f"why {_named(explained.title, explained.item)} for user {_plain(explained.user)}"),
        caption=Text(_caption(explained)),
    )
    table.add_column("event", justify="right")
    table.add_column("item", overflow="fold")  # whole on any terminal: it is what --item takes
    titled, timed, typed = _has(explained.events)
    if titled:
        table.add_column("title", overflow="fold")
    if timed:
        table.add_column("time")
    if typed:
        table.add_column("type")
    table.add_column("share", justify="right")
    table.add_column("logits", justify="right")
    for event in shown:
        words = [event.item_id]
        words += [event.title or ""] * titled
        words += [_date(event.time)] * timed + [event.event or ""] * typed
        cells = [Text(_plain(word)) for word in words]
        table.add_row(str(event.position), *cells, f"{event.percent:.1f} %", f"{event.share:+.4f}")
    if left := explained.events[len(shown) :]:
        percent = sum(event.percent for event in left)
        blank = [""] * (titled + timed + typed)
        what = f"{len(left):,} others"
        table.add_row("", what, *blank, f"{percent:.1f} %", f"{explained.rest(len(shown)):+.4f}")
    return table


def picture_of(explained: Explanation, top: int) -> bytes:
    """A PNG with a bar for each event's share in logits, and one for the rest."""
    shown = explained.events[:top]
    titled, timed, _ = _has(explained.events)
    labels, shares, colours = [], [], []
    for event in shown:
        name = _short(event.title if titled and event.title else event.item_id)
        labels.append(f"{name}  {_date(event.time)}" if timed else f"{name}  ({event.position})")
        shares.append(event.share)
        colours.append(FOR if event.share >= 0 else AGAINST)
    if len(explained.events) > len(shown):
        labels.append(f"{len(explained.events) - len(shown):,} others")
        shares.append(explained.rest(len(shown)))
        colours.append(REST)
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(labels)), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = axes.barh(range(len(labels)), shares, color=colours)
    axes.bar_label(bars, [f"{share:+.2f}" for share in shares], padding=3, color=INK, fontsize=9)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("share of the score, in logits", color=INK)
    axes.tick_params(colors=INK, length=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    title = f"Why {_short(_named(explained.title, explained.item))} for user {_short(explained.user)}"
    place = {"x": 0.01, "ha": "left", "color": INK}
    words = [
        *axes.get_yticklabels(),
        figure.suptitle(title, fontsize=12, fontweight="bold", **place),
        figure.supxlabel(_caption(explained), fontsize=7, **place),
    ]
    for text in words:  # what the data says is no formula, whatever dollars are in it
        text.set_parse_math(False)
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for such a letter
        figure.savefig(written, format="png")
    return written.getvalue()


def table_of_faithfulness(found: Faithfulness, events: int) -> Table:
    """A row a method: what leaving out the events that it names costs, and how many times what random ones do."""
    table = Table(
        title=f"{found.users:,} users, best recommendation: the score falls when {events} events had not been",
        caption="mean [middle 95 % of means with other users]; -: random events may cost nothing",
    )
    table.add_column("events left out")
    for measure in MEASURES:
        table.add_column(measure, justify="right")
        table.add_column("times random", justify="right")
    chance = [found.random[measure] for measure in MEASURES]
    table.add_row("random", *(w for c in chance for w in (f"{c.mean:.3f} [{c.low:.3f}, {c.high:.3f}]", "1")))
    for name, losses in found.named.items():
        cells = []
        for measure in MEASURES:
            loss, ratio = losses[measure], found.ratio[name][measure]
            times = "-" if ratio is None else f"{ratio.mean:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            cells += [f"{loss.mean:.3f} [{loss.low:.3f}, {loss.high:.3f}]", times]
        table.add_row(name, *cells)
    return table


def _caption(explained: Explanation) -> str:
    told = [f"score {explained.score:.4f}, rank {explained.rank:,}, by {explained.method}"]
    if explained.seen:
        told.append("in the history already")
    if explained.interest is not None:
        told.append(f"interest {explained.interest}")
    if explained.counts:
        told.append(f"neighbours' counts {explained.counts:+.4f}")
    told.append(f"{explained.baseline_is} {explained.baseline:.4f}, left over {explained.residual:+.4f}")
    if explained.unread:
        told.append(f"{explained.unread:,} older events are not read")
    return "; ".join(told)


def _has(events: tuple[Event, ...]) -> tuple[bool, bool, bool]:
    """Whether any event has a title, a time, a type."""
    return (
        any(event.title for event in events),
        any(event.time is not None for event in events),
        any(event.event for event in events),
    )


def _named(title: str | None, item: str) -> str:
    return _plain(f"{title} ({item})" if title else item)


def _plain(word: str) -> str:
    """A word of the data on one line; what would steer a terminal is shown as a question mark."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in word)


def _short(word: str) -> str:
    word = _plain(word)
    return word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…"


def _date(seconds: int | None) -> str:
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")
