"""Checks on memory: how many bytes a key-value cache takes, and what compressing it saves."""
