"""Many processes: worker processes are started here alone; benchmarks, drift, bisection."""
