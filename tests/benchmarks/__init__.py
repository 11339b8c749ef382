"""Timed comparisons with softmax attention and with other libraries: `python -m tests.benchmarks --help`."""
