"""Charts as SVG text, to stand inside of a page: no script, no network, every word escaped."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from dynrec_jax.report.interests import COLOURS, INK, REST_COLOUR

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 24, 84  # room around what is drawn


class Point(NamedTuple):
    """A value, and the interval around it where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class _Frame(NamedTuple):
    """Where numbers lie on the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        low, high = self.x
        return LEFT + (x - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def up(self, y: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (y - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)


def lines(series: Mapping[str, Sequence[Point]], x_title: str, y_title: str, from_zero: bool = True) -> str:
    """A line with marks for each name; intervals as bars. Points that are not finite are left out.

    Args:
      series: points by name, x ascending.
      x_title: of the horizontal axis.
      y_title: of the vertical axis.
      from_zero: whether the vertical axis begins at 0.
    """
    kept = _finite(series)
    every = [point for points in kept.values() for point in points]
    frame = _frame(every, from_zero)
    x_low, x_high = frame.x
    ticks = [(value, _number(value)) for value in _ticks(x_low, x_high)]
    return _chart(frame, kept, ticks, x_title, y_title)


def bins(series: Mapping[str, Sequence[Point]], labels: Sequence[str], y_title: str) -> str:
    """As `lines`, over bins with names: the points' own `x` is not looked at."""
    count = max(len(series), 1)
    placed = {
        name: [Point(i + 0.06 * (number - (count - 1) / 2), *point[1:]) for i, point in enumerate(points)]
        for number, (name, points) in enumerate(series.items())
    }
    kept = _finite(placed)
    top = max((p.high or p.y for points in kept.values() for p in points), default=1.0)
    frame = _Frame((-0.5, len(labels) - 0.5), (0.0, top * 1.08 or 1.0))
    return _chart(frame, kept, list(enumerate(labels)), "", y_title)


def areas(
    times: Sequence[float],
    shares: Mapping[str, Sequence[float]],
    ticks: Sequence[tuple[float, str]],
    y_title: str,
) -> str:
    """Shares that lie one above the other and add up to 1; the last one is that of all others.

    Args:
      times: P of them, ascending.
      shares: P numbers from 0 to 1 by name.
      ticks: places on the horizontal axis, and what stands there.
      y_title: of the vertical axis.
    """
    frame = _Frame((times[0], times[-1]), (0.0, 1.0))
    base = [0.0] * len(times)
    drawn = []
    for number, (name, values) in enumerate(shares.items()):
        top = [low + value for low, value in zip(base, values, strict=True)]
        outline = [f"{frame.across(x):.1f},{frame.up(y):.1f}" for x, y in zip(times, top, strict=True)]
        back = [f"{frame.across(x):.1f},{frame.up(y):.1f}" for x, y in zip(times, base, strict=True)][::-1]
        colour = COLOURS[number % len(COLOURS)] if number < len(shares) - 1 else REST_COLOUR
        drawn.append(
            f'<polygon class="mark" points="{" ".join(outline + back)}" fill="{colour}">'
            f"<title>{escape(name)}</title></polygon>"
        )
        base = top
    colours = [*COLOURS[: len(shares) - 1], REST_COLOUR]
    return _svg("".join(drawn) + _axes(frame, ticks, "", y_title), dict(zip(shares, colours, strict=False)))


def _finite(series: Mapping[str, Sequence[Point]]) -> dict[str, list[Point]]:
    found = {
        name: [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
        for name, points in series.items()
    }
    return {name: points for name, points in found.items() if points}


def _frame(points: Sequence[Point], from_zero: bool) -> _Frame:
    xs, highs = [p.x for p in points] or [0.0, 1.0], [p.high or p.y for p in points] or [1.0]
    low = 0.0 if from_zero else min((p.low if p.low is not None else p.y for p in points), default=0.0)
    room = 0.06 * (max(highs) - low) or 1.0
    return _Frame((min(xs), max(xs)), (low if from_zero else low - room, max(highs) + room))


def _chart(
    frame: _Frame,
    series: Mapping[str, Sequence[Point]],
    ticks: Sequence[tuple[float, str]],
    x_title: str,
    y_title: str,
) -> str:
    drawn, colours = [], {}
    for number, (name, points) in enumerate(series.items()):
        colour = colours[name] = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{frame.across(p.x):.1f},{frame.up(p.y):.1f}" for p in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        for point in points:
            x, y = frame.across(point.x), frame.up(point.y)
            if point.low is not None and point.high is not None:
                drawn.append(
                    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{frame.up(point.low):.1f}" y2="{frame.up(point.high):.1f}" '
                    f'stroke="{colour}" stroke-width="1"/>'
                )
            told = escape(f"{name}: {_number(point.y)}")
            drawn.append(
                f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"><title>{told}</title></circle>'
            )
    return _svg(_axes(frame, ticks, x_title, y_title) + "".join(drawn), colours)


def _svg(inside: str, colours: Mapping[str, str]) -> str:
    keys, at = [], LEFT
    for name, colour in colours.items():
        keys.append(
            f'<rect x="{at}" y="{HEIGHT - 14}" width="10" height="10" fill="{colour}"/>'
            f'<text x="{at + 14}" y="{HEIGHT - 5}">{escape(_short(name, 22))}</text>'
        )
        at += 26 + 7 * min(len(name), 22)
    return (
        f'<svg class="chart" viewBox="0 0 {max(WIDTH, at)} {HEIGHT}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg">{inside}{"".join(keys)}</svg>'
    )


def _axes(frame: _Frame, ticks: Sequence[tuple[float, str]], x_title: str, y_title: str) -> str:
    low, high = frame.y
    parts = []
    for value in _ticks(low, high):
        y = frame.up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    slanted = sum(len(label) for _, label in ticks) > 84
    most = 24 if len(ticks) > 3 else 44
    for value, label in ticks:
        x, y = frame.across(value), HEIGHT - BOTTOM + 14
        # At either end a word is not cut off by the picture's edge.
        anchor = "start" if x < LEFT + 20 else "end" if x > WIDTH - RIGHT - 20 else "middle"
        slant = f' transform="rotate(-25 {x:.1f} {y})"' if slanted else ""
        turn = f' text-anchor="{"end" if slanted else anchor}"{slant}'
        parts.append(f'<text x="{x:.1f}" y="{y}"{turn}>{escape(_short(label, most))}</text>')
    if x_title:
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text x="{middle:.0f}" y="{HEIGHT - 30}" text-anchor="middle">{escape(x_title)}</text>'
        )
    parts.append(f'<text x="4" y="{TOP - 12}" fill="{INK}">{escape(y_title)}</text>')
    return "".join(parts)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 or value == round(value) else f"{value:.4g}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
