"""Checks on documents: does a source's own arithmetic, table or code give the figures that it prints?"""
