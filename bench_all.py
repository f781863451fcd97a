"""Trains one Transformer with every framework and compares them: `python bench_all.py --help`."""

import sys

from common.cli.main import bench_main

if __name__ == "__main__":
    sys.exit(bench_main())
