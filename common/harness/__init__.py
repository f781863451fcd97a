"""Many processes: starts, watches and restarts workers; benchmarks, drift, bisection. Only this room starts processes."""
