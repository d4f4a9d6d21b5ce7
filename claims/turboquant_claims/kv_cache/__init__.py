"""Checks on compressed caches in a real model: retrieval, perplexity, divergence, attention, mechanisms."""
