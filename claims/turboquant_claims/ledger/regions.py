"""Which results confirm a cell? The region of acceptance, and the one that a printed figure stands for."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal

NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?")


def significant(value: float) -> float:
    """`value` at 12 significant digits: 0.1 + 0.2 and 0.3 are the same figure."""
    return float(f"{value:.12g}")


@dataclass(frozen=True)
class Region:
    """The results that confirm a cell: an interval, with or without its edges."""

    lo: float
    hi: float
    lo_closed: bool = True
    hi_closed: bool = True

    def contains(self, value: float) -> bool:
        """Whether a value lies in the region."""
        return self.covers(value, value)

    def covers(self, lo: float, hi: float) -> bool:
        """Whether the whole interval [lo, hi] lies in the region."""
        lo, hi, left, right = map(significant, (lo, hi, self.lo, self.hi))
        return (lo > left or (self.lo_closed and lo == left)) and (
            hi < right or (self.hi_closed and hi == right)
        )

    def misses(self, lo: float, hi: float) -> bool:
        """Whether no point of [lo, hi] lies in the region."""
        lo, hi, left, right = map(significant, (lo, hi, self.lo, self.hi))
        return (
            hi < left
            or lo > right
            or (hi == left and not self.lo_closed)
            or (lo == right and not self.hi_closed)
        )

    def distance(self, value: float) -> float:
        """Distance from a value to the nearest finite edge; infinite if there is none."""
        return min(
            (abs(value - edge) for edge in (self.lo, self.hi) if math.isfinite(edge)), default=math.inf
        )

    def __str__(self) -> str:
        left, right = "[" if self.lo_closed else "(", "]" if self.hi_closed else ")"
        return f"{left}{self.lo:.6g}, {self.hi:.6g}{right}"


def printed(stated: str) -> tuple[Decimal, Decimal]:
    """The one number in a figure as printed, and half a unit of its last digit.

    Args:
        stated: "0.047", "1571", "1.5e-3", "~3.8", "4.5x", "5 %", "2,048".

    Raises:
        ValueError: it holds no number, or several.
    """
    numbers = [match.group() for match in NUMBER.finditer(stated) if match.group().strip("+-−")]
    if len(numbers) != 1:
        raise ValueError(
            f"stated = {stated!r} must hold exactly one number, or the cell needs accept = [lo, hi]"
        )
    number = Decimal(numbers[0].replace(",", "").replace("−", "-"))
    exponent = number.as_tuple().exponent
    return number, Decimal(1).scaleb(int(exponent)) / 2


def as_printed(stated: str) -> Region:
    """Every value that rounds to the printed figure, halves away from zero.

    "0.047" is [0.0465, 0.0475), "-0.047" is (-0.0475, -0.0465], and "0" is (-0.5, 0.5).
    """
    number, half = printed(stated)
    return Region(float(number - half), float(number + half), lo_closed=number > 0, hi_closed=number < 0)
