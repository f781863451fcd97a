"""Many processes: start, watch and restart workers; benchmarks, drift, bisection.

Only this room starts processes.
"""
