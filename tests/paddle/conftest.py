"""Skips this folder where Paddle is not installed."""

import pytest

pytest.importorskip("paddle")
