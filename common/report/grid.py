"""A table of text, described once: for the terminal, for Markdown, and for the page's template."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Grid:
    """Titles and rows of text; the columns of words stand left, those of numbers right."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[str]
    """The titles of the columns of words."""
    styles: Sequence[str] = ()
    """By row: empty, `red` (needs attention) or `dim`. None given: all empty."""

    def without(self, titles: Collection[str]) -> Grid:
        """Return the grid without these columns."""
        kept = [i for i, title in enumerate(self.titles) if title not in titles]
        rows = [[row[i] for i in kept] for row in self.rows]
        return replace(self, titles=[self.titles[i] for i in kept], rows=rows)

    def markdown(self) -> str:
        """Return the table as Markdown, a line for each row."""
        # The colon on the right makes numbers line up. A bar in a cell would end it.
        marks = ["---" if title in self.words else "---:" for title in self.titles]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        lines = [self.titles, marks, *cells]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def rich(self, fold_titles: bool = False) -> Table:
        """Return the table for a terminal; `fold_titles` puts long titles on two lines."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in self.titles:
            folded = title.replace("micro-", "micro- ").replace(" ", "\n", 1)
            table.add_column(
                Text(folded if fold_titles else title),
                justify="left" if title in self.words else "right",
                no_wrap=True,
            )
        for row, style in zip(self.rows, self.styles or [""] * len(self.rows), strict=True):
            table.add_row(*map(Text, row), style=style or None)
        return table
