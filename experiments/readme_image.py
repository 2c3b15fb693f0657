"""Draw the image of the README, the accuracy of the quick start, from results/quickstart.md.

    python experiments/readme_image.py

`make table` repeats the runs of that table. Needs altair and vl-convert-python.
"""

import re
from pathlib import Path

import altair as alt
import vl_convert

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "results" / "quickstart.md"
IMAGE = ROOT / "docs" / "images" / "quickstart.svg"
INK = "#767676"  # a contrast of 4.5 on white and on black
TITLES = {
    "none": "student, labels only",
    "hard": "student, hard distillation",
    "soft": "student, soft distillation",
    "teacher": "teacher, a CNN",
}
COLOURS = [INK, "#2f81d7", "#2f81d7", "#c06a1b"]


def read_rows(text: str) -> list[dict[str, float | str]]:
    """Return {"run", "top-1, %", "low", "high", "text"} of the runs, in the order of TITLES."""
    found = re.findall(r"^\| (\w+) \| ([\d.]+) ± ([\d.]+) \|.*--", text, re.MULTILINE)
    by_name = {name: (float(mean), float(std)) for name, mean, std in found}
    rows: list[dict[str, float | str]] = []
    for name, title in TITLES.items():
        mean, std = by_name[name]
        row = {"run": title, "top-1, %": mean, "low": mean - std, "high": min(100, mean + std)}
        rows.append(row | {"text": f"{mean:.1f} ± {std:.1f}"})
    return rows


def draw(rows: list[dict[str, float | str]]) -> str:
    """Return the chart as SVG, with a transparent background."""
    base = alt.Chart(alt.Data(values=rows), width=230, height=alt.Step(30)).encode(
        y=alt.Y("run:N", sort=None, title=None),
        color=alt.Color("run:N", scale=alt.Scale(range=COLOURS), sort=None, legend=None),
    )
    scale = alt.Scale(domain=[65, 100])
    axis = alt.Axis(tickCount=4)
    title = "top-1 on 600 test digits, %, five seeds"
    points = base.mark_point(filled=True, size=80, opacity=1).encode(
        x=alt.X("top-1, %:Q", scale=scale, axis=axis, title=title)
    )
    bars = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", scale=scale, title=title), x2="high:Q"
    )
    texts = base.mark_text(dy=-11, fontSize=12).encode(x="top-1, %:Q", text="text:N")
    ink = dict.fromkeys(("labelColor", "titleColor", "tickColor", "domainColor"), INK)
    sizes = {"labelFontSize": 13, "titleFontSize": 12, "titleFontWeight": "normal"}
    axes = ink | sizes | {"gridColor": INK, "gridOpacity": 0.25, "labelLimit": 200}
    config = {"background": "transparent", "view": {"stroke": None}, "axis": axes}
    return vl_convert.vegalite_to_svg({**(bars + points + texts).to_dict(), "config": config})


def main() -> None:
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_text(draw(read_rows(TABLE.read_text())) + "\n")
    print(IMAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
