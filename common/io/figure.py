"""Matplotlib, set up in one place: no window, and no markup in names."""

from __future__ import annotations

import warnings
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


def log_y(axes: Axes) -> None:
    """Make the y axis logarithmic, with its numbers as plain text (1e-05), not as mathematics."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0e}")
    axes.yaxis.set_minor_formatter("")
