"""Timings of the kernels against the best of what they replace; run a file as a module."""
