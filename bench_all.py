"""Trains the same Transformer with every framework and compares them: `python bench_all.py --help`."""  # noqa: E501

import sys

from common.cli.main import bench_main

if __name__ == "__main__":
    sys.exit(bench_main())
