"""Tests of what imports no framework."""
