"""The referee: a ledger of claims, checks that measure them, and a judge that decides.

A check is an ordinary pytest function bound to the ledger by `claim`; it measures and records, never decides.
"""

from collections.abc import Callable
from typing import TypeVar

Check = TypeVar("Check", bound=Callable[..., object])

BOUND_TO = "turboquant_claim_ids"


def claim(*ids: str) -> Callable[[Check], Check]:
    """Bind a check to ledger claims: the plugin then runs it once for each of their cells and subjects.

    Args:
        *ids: ids of claims in the ledger; one check may serve several claims.

    Returns:
        A decorator that leaves the function as it is, but for the ids kept on it.

    Raises:
        TypeError: no id was given, or something else than strings (the parentheses were forgotten).
    """
    if not ids or not all(isinstance(id_, str) for id_ in ids):
        raise TypeError(f"@claim takes one or more claim ids, such as @claim('paper-v1-mse-b3'), not {ids!r}")

    def bind(check: Check) -> Check:
        setattr(check, BOUND_TO, ids)
        return check

    return bind
