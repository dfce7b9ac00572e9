"""How many more labelled prompts would decide a check that is not proven, if all stays as it was measured.

A test decides where an effect is some standard errors away from its limit, and these shrink with the root of the rows.
The figures hold for four of five further test sets of that size.
"""

import math

from scipy.stats import norm

from guardloop.evaluation.bootstrap import TAIL
from guardloop.evaluation.measurements import Changed, Spread

ERRORS = float(norm.isf(TAIL) + norm.isf(0.2))
"""Standard errors between an effect and its limit at which four of five tests decide."""
MANY = 100_000
WRONG_WAY = "More prompts would hardly decide it: what was measured does not point the right way."


def more_of_both(change: float, spread: Spread, unsafe: int, safe: int) -> str:
    """What would show that `change` is above 0, on so many distinct prompts of each class: the fewest that would."""
    if change <= 0:
        return WRONG_WAY
    allowed = (change / ERRORS) ** 2
    grown = (spread.unsafe + spread.safe) / allowed
    ways = [(_more(unsafe + safe, grown), "prompts, safe and unsafe as in this test set")]
    if allowed > spread.safe:
        ways.append((_more(unsafe, spread.unsafe / (allowed - spread.safe)), "unsafe prompts"))
    if allowed > spread.unsafe:
        ways.append((_more(safe, spread.safe / (allowed - spread.unsafe)), "safe prompts"))
    return sentence(*min(ways))


def more_rows(room: float, error: float, rows: int) -> int | None:
    """How many more rows would show that an effect keeps off its limit, from which it is `room` away; None: no number
    would, as it is on the wrong side. `error` is its standard error on `rows` rows."""
    return None if room <= 0 else _more(rows, (ERRORS * error / room) ** 2)


def more_decisions(changed: Changed, prompts: int, kind: str) -> str:
    """What would make McNemar's test decide, on prompts of one class."""
    total = changed.mended + changed.spoiled
    if changed.mended <= changed.spoiled:
        return WRONG_WAY
    share = changed.mended / total
    spread = 0.5 * float(norm.isf(TAIL)) + math.sqrt(share * (1 - share)) * float(norm.isf(0.2))
    needed = (spread / (share - 0.5)) ** 2  # changed decisions
    return sentence(_more(prompts, needed / total), f"{kind} prompts")


def sentence(count: int | None, kind: str) -> str:
    """E.g. "About 320 more unsafe prompts would decide it."."""
    if count is None:
        return WRONG_WAY
    amount = f"About {count:,} more" if count <= MANY else f"More than {MANY:,} further"
    return f"{amount} {kind} would decide it."


def _more(rows: int, grown: float) -> int:
    """How many to add so that there are `grown` times as many, rounded up to two digits."""
    more = max(math.ceil(rows * (grown - 1)), 1)
    unit: int = 10 ** max(len(str(more)) - 2, 0)
    return math.ceil(more / unit) * unit
