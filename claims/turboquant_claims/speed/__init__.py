"""Checks on speed: what attention over codes, a decoding step and quantizing itself cost on a GPU."""
