"""Long-running acceptance runs. `python -m benchmarks.acceptance.NAME` prints its figures; 1: short of the bar."""
