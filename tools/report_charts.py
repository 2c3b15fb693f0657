"""Charts of the report, drawn by Altair (an optional package) as Vega-Lite with SVG output.

Rows are dicts with the same keys; the keys are titles of axes and of the text under the pointer.
Colours are the variables of report.css, so that a chart follows dark mode and print.
"""

import functools
from collections.abc import Sequence
from typing import Any

try:
    import altair as alt
    import vl_convert
except ImportError:
    alt = None

INSTALL = "pip install altair vl-convert-python"
PALETTE = [f"var(--c{i})" for i in range(6)]
MOST_TEXTS = 12  # classes of a matrix whose cells have room for a number
INK = ("labelColor", "titleColor", "tickColor", "domainColor")
CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": dict.fromkeys(INK, "currentColor")
    | {"gridColor": "var(--faint)", "labelFontSize": 12, "titleFontSize": 12, "labelLimit": 120},
    "legend": {"labelColor": "currentColor", "orient": "bottom", "columns": 1, "title": None}
    | {"labelFontSize": 12, "labelLimit": 280},
}
Rows = Sequence[dict[str, Any]]


@functools.cache  # it takes seconds
def program() -> str:
    """Return the JavaScript that draws charts; it loads nothing."""
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    return vl_convert.javascript_bundle(vl_version=version)


def specification(chart: Any, description: str) -> dict[str, Any]:
    """Return what the program draws. description: read by screen readers."""
    found = chart.properties(width="container", description=description).to_dict()
    return {**found, "config": CONFIG}


def lines(rows: Rows, x: str, y: str, name: str, names: Sequence[str] = ()) -> Any:
    """Return a line for each value of `name`. names: of all charts, so that colours agree."""
    field = _fields(rows)
    values = [row[x] for row in rows]
    whole = all(isinstance(value, int) for value in values)
    ticks = min(8, max(values) - min(values)) if whole else 6  # none between whole numbers
    return (
        _chart(rows)
        .mark_line(point=True)
        .encode(
            x=alt.X(field[x], axis=alt.Axis(tickCount=ticks)),
            y=alt.Y(field[y], scale=alt.Scale(zero=False)),
            color=_colour(rows, name, names),
            strokeDash=alt.StrokeDash(field[name], legend=None),
        )
    )


def reliability(rows: Rows, x: str, y: str, name: str) -> Any:
    """Return accuracy over confidence, with the diagonal on which both are equal."""
    ends = alt.Data(values=[{x: 0, y: 0}, {x: 100, y: 100}])
    diagonal = alt.Chart(ends).mark_line(strokeDash=[4, 3], color="currentColor", strokeWidth=1)
    return diagonal.encode(x=f"{x}:Q", y=f"{y}:Q") + lines(rows, x, y, name)


def bars(rows: Rows, category: str, x: str, name: str) -> Any:
    """Return horizontal bars, for each category one for each value of `name`."""
    field = _fields(rows)
    return (
        _chart(rows, height=alt.Step(12 if len({row[name] for row in rows}) > 1 else 20))
        .mark_bar()
        .encode(
            x=alt.X(field[x], scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5)),
            y=alt.Y(field[category], sort=None, title=None),
            yOffset=alt.YOffset(field[name], sort=None),
            color=_colour(rows, name),
        )
    )


def matrix(rows: Rows, x: str, y: str, count: str, share: str) -> Any:
    """Return a matrix of counts, stronger for a larger share of its row."""
    field = _fields(rows)
    cells = _chart(rows, height=alt.Step(24)).encode(
        x=alt.X(field[x], sort=None, axis=alt.Axis(labelAngle=-90, labelLimit=90)),
        y=alt.Y(field[y], sort=None, axis=alt.Axis(labelLimit=90)),
    )
    strength = alt.Opacity(field[share], scale=alt.Scale(domain=[0, 100], range=[0, 0.7]))
    fill = cells.mark_rect(color=PALETTE[0]).encode(opacity=strength.legend(None))
    fits = len({row[x] for row in rows}) <= MOST_TEXTS
    return fill + cells.mark_text(color="currentColor").encode(text=field[count]) if fits else fill


def scatter(
    rows: Rows, x: str, y: str, ends: tuple[str, str], name: str, names: Sequence[str]
) -> Any:
    """Return points with their intervals, x on a logarithmic axis. names: as of `lines`."""
    field = _fields(rows)
    scale = alt.Scale(type="log", nice=False, padding=30)
    points = _chart(rows).encode(
        x=alt.X(field[x], scale=scale, axis=alt.Axis(tickCount=4, format="~s", labelFlush=20)),
        color=_colour(rows, name, names),
    )
    low = alt.Y(field[ends[0]], title=y, scale=alt.Scale(zero=False))
    rule = points.mark_rule().encode(y=low, y2=alt.Y2(ends[1]))
    shape = alt.Shape(field[name], legend=None)
    return rule + points.mark_point(filled=True, size=90).encode(y=field[y], shape=shape)


def spread(rows: Rows, category: str, x: str) -> Any:
    """Return a point for each row, and a line at the mean of each category."""
    field = _fields(rows)
    chart = _chart(rows, height=alt.Step(40)).encode(
        y=alt.Y(field[category], sort=None, title=None)
    )
    axis = alt.X(field[x], scale=alt.Scale(zero=False))
    points = chart.mark_point(filled=True, size=70, color=PALETTE[0]).encode(x=axis)
    mean = alt.X(f"mean({x}):Q", title=x)
    about = [field[category], alt.Tooltip(f"mean({x}):Q", title="mean", format=".2f")]
    line = chart.mark_tick(color="currentColor", thickness=2, size=26)
    return points + line.encode(x=mean, tooltip=about)


def _fields(rows: Rows) -> dict[str, str]:
    """Return each key as Altair names a field: a quantity if its values are numbers, or a name."""
    return {
        key: f"{key}:{'Q' if isinstance(value, int | float) else 'N'}"
        for row in reversed(rows)
        for key, value in row.items()
        if value is not None
    }


def _chart(rows: Rows, height: Any = 220) -> Any:
    chart = alt.Chart(alt.Data(values=list(rows)), height=height)
    return chart.encode(tooltip=list(_fields(rows).values()))


def _colour(rows: Rows, name: str, names: Sequence[str] = ()) -> Any:
    found = list(dict.fromkeys(row[name] for row in rows))
    legend = alt.Legend(values=found) if len(found) > 1 else None
    scale = alt.Scale(domain=list(names or found), range=PALETTE)
    return alt.Color(f"{name}:N", scale=scale, legend=legend)
