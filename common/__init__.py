"""What the three implementations share: specification, partition, schedules, oracle, harness.

Imports no framework.
"""
