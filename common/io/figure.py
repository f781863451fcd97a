"""Matplotlib, set up in one place: no window, and no markup in names."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches. Imports Matplotlib only now: few need it."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # `$` is a letter of a file's name
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # it is drawn as a box
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def small_print() -> Iterator[None]:
    """Draw within with the letters and frames of a report's pictures."""
    import matplotlib

    with matplotlib.rc_context(
        {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    ):
        yield


def log_y(axes: Axes) -> None:
    """Make the y axis logarithmic, with its numbers as plain text (1e-05), not as mathematics."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0e}")
    axes.yaxis.set_minor_formatter("")


def inline_svg(figure: Figure, themed: Mapping[str, str], titles: Sequence[str] = ()) -> str:
    """Return the figure as an `<svg>` for the middle of an HTML page.

    Its letters are text in the page's font. `themed` maps a colour (`#d1495b`) to the CSS variable
    that a page may set in its place, as for dark mode. `titles` are shown over the paths of the
    groups (`gid`) named "titled", in order.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        figure.savefig(file, format="svg")
    text = file.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S
    )
    over = iter(titles)

    def with_titles(group: re.Match[str]) -> str:
        return re.sub(r"/>", lambda _: f"><title>{escape(next(over))}</title></path>", group[0])

    text = re.sub(r'<g id="titled">.*?</g>', with_titles, text, flags=re.S)
    # A page has several pictures: names that Matplotlib counts from 1 would not be unique in it.
    # Those of clip paths and markers are digests, and used.
    text = re.sub(r' id="(?:\w+\.)?(?:titled|[a-z0-9A-Z]+_\d+)"', "", text)
    text = re.sub(r' xmlns(?::\w+)?="[^"]*"| version="1.1"| transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    for color, name in themed.items():
        text = text.replace(color, f"var(--{name}, {color})")
    return re.sub(r"\s+", " ", text)
