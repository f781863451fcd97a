"""The report as Markdown: verdict, sections, facts."""

from __future__ import annotations

from collections.abc import Collection as Names
from collections.abc import Sequence

from common.report.collect import Collection
from common.report.facts import facts, parity_verdict
from common.report.sections import Section


def markdown_report(
    collection: Collection, sections: Sequence[Section], pictures: Names[str]
) -> str:
    """Return the whole of report.md, which shows the `pictures` beside it."""
    blocks = [
        f"# Pipeline-parallel training, preset {collection.results[0].preset}",
        parity_verdict(collection).text,
        "\n".join(f"- {line}" for line in collection.problems),
    ]
    for each in sections:
        blocks += [
            f"## {each.title}",
            each.lead,
            each.grid.markdown() if each.grid else "",
            f"![{each.title}]({each.picture}.png)" if each.picture in pictures else "",
            each.details.markdown() if each.details else "",
            "\n".join(f"- {line}" for line in each.lines),
            each.note,
        ]
    known = "\n".join(f"- {name}: {value}" for name, value in facts(collection))
    return "\n\n".join(b.strip() for b in [*blocks, "## What was run", known] if b) + "\n"
