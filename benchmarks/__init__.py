"""How fastpool compares, measured in one run on one machine: `python -m benchmarks`."""
