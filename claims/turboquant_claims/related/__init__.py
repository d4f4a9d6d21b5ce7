"""Checks of what is claimed about related methods: QJL, PolarQuant, EDEN, RaBitQ, released code and blogs."""
