"""Skips this folder where PyTorch is not installed."""

import pytest

pytest.importorskip("torch")
