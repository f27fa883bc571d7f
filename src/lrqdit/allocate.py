"""Mixed precision: which bit width each layer gets, so that the model's error is smallest within a budget of bytes."""

from collections.abc import Sequence

import numpy as np

UNITS = 1 << 17


def choose_options(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> list[int]:
    """One option for each item: the smallest sum of errors whose sum of costs does not exceed the budget.

    Exact by dynamic programming as long as the costs differ by at most 131072 in all; above that what an item costs
    beyond its cheapest option is rounded up to a whole unit, so the budget is still kept. The unit does not depend on
    the budget: a larger one never has a larger sum of errors.

    Args:
        costs: of every option of every item.
        errors: likewise; what they sum up to is what is minimized.
        budget: in the unit of the costs, at least the sum of the cheapest options.

    Returns:
        The index of each item's option; the cheaper one of equal sums.

    Raises:
        ValueError: if not even the cheapest options fit.
    """
    cheapest = [min(item) for item in costs]
    span = sum(max(item) for item in costs) - sum(cheapest)
    unit = max(1, -(-span // UNITS))
    room = min(budget - sum(cheapest), span + unit * len(costs)) // unit
    if room < 0:
        raise ValueError(f"the cheapest options cost {sum(cheapest)}, the budget is {budget}")
    smallest = np.zeros(room + 1)  # by what may be spent
    spent, picks = [], []
    for item, item_errors, low in zip(costs, errors, cheapest, strict=True):
        units = [-(-(cost - low) // unit) for cost in item]
        sums = np.full((len(item), room + 1), np.inf)
        for option, (steps, error) in enumerate(zip(units, item_errors, strict=True)):
            if steps <= room:
                sums[option, steps:] = smallest[: room + 1 - steps] + error
        pick = sums.argmin(axis=0).astype(np.uint8)
        smallest = np.take_along_axis(sums, pick[None].astype(np.intp), axis=0)[0]
        spent.append(units)
        picks.append(pick)
    place, chosen = room, []
    for units, pick in zip(reversed(spent), reversed(picks), strict=True):
        chosen.append(int(pick[place]))
        place -= units[chosen[-1]]
    return chosen[::-1]
