"""Which levels are optimal for a rotated coordinate, and how many bits do their codes need?"""
