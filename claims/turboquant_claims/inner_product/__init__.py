"""Checks of what is claimed about inner products: bias, variance, bounds, and which quantizer to use."""
