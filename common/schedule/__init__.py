"""When: schedules as data, with generators, validation, simulation, search and drawing.

Imports no other room but io.
"""
