"""Checks on bits: what a setting stores for each coordinate, and what a channel split costs and gains."""
