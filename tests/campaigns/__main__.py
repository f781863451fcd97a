"""`python -m tests.campaigns relay`, `... margins`: the campaigns that are built like subcommands
of `triptych`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.cli import main as cli

CAMPAIGNS = {
    "relay": ("relay", "hand one training from framework to framework"),
    "margins": ("margins_command", "measure how much of every parity limit is used"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one campaign and return its exit status."""
    return cli.main(argv, CAMPAIGNS, "tests.campaigns", "python -m tests.campaigns")


if __name__ == "__main__":
    sys.exit(main())
