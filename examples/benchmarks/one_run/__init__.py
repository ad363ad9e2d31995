"""The parts of `examples/benchmarks/one_run.py`: tasks, competitors, and the harness that runs them."""
