"""How a cell's text becomes figures: printed columns ("61 84") and channel splits ("32x4+96x3")."""


def numbers(text: str | float) -> list[float]:
    """Return the figures of a column printed on one line, separated by spaces."""
    return [float(figure) for figure in str(text).split()]


def split(text: str) -> list[tuple[int, int]]:
    """Return the parts of a channel split: "32x4+96x3" is [(32, 4), (96, 3)], channels and bits."""
    parts = []
    for part in text.split("+"):
        channels, bits = part.split("x")
        parts.append((int(channels), int(bits)))
    return parts


def extreme(column: str, statistic: str) -> float:
    """Return the "smallest" or "largest" figure of a printed column."""
    return {"smallest": min, "largest": max}[statistic](numbers(column))
