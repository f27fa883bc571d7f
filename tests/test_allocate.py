import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrqdit.fitting import bits as allocate
from lrqdit.fitting.bits import choose_options

ITEM = st.lists(st.tuples(st.integers(1, 300), st.floats(0, 10)), min_size=1, max_size=4)
ITEMS = st.lists(ITEM, min_size=1, max_size=5)


def split(items):
    return [[cost for cost, _ in item] for item in items], [[error for _, error in item] for item in items]


def total(values, picks):
    return sum(value[pick] for value, pick in zip(values, picks, strict=True))


@given(items=ITEMS, extra=st.integers(0, 1500))
def test_the_same_as_trying_everything(items, extra):
    costs, errors = split(items)
    budget = sum(map(min, costs)) + extra
    picks = choose_options(costs, errors, budget)
    assert total(costs, picks) <= budget
    every = itertools.product(*(range(len(item)) for item in items))
    best = min(total(errors, tried) for tried in every if total(costs, tried) <= budget)
    assert total(errors, picks) == pytest.approx(best, abs=1e-9)


@given(items=ITEMS, one=st.integers(0, 1500), other=st.integers(0, 1500), units=st.sampled_from([7, 50, 1 << 17]))
def test_more_budget_never_has_more_error(items, one, other, units):
    costs, errors = split(items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate, "UNITS", units)  # coarse units, as large models have them
        small, large = (choose_options(costs, errors, sum(map(min, costs)) + room) for room in sorted((one, other)))
    assert total(errors, large) <= total(errors, small) + 1e-9
    assert total(costs, small) <= sum(map(min, costs)) + min(one, other)


def test_large_costs():
    """Costs of a model of 12 billion parameters: the budget is kept, and little of it is lost to the units."""
    layers = 300
    costs = [[40_000_000 * bits // 8 + 1000 * bits for bits in (2, 3, 4, 5, 6, 8)] for _ in range(layers)]
    errors = [[(1 + index) * 4.0**-bits for bits in (2, 3, 4, 5, 6, 8)] for index in range(layers)]
    budget = int(1.5 * sum(item[0] for item in costs))
    spent = total(costs, choose_options(costs, errors, budget))
    assert 0.99 * budget < spent <= budget


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="the cheapest options cost 7"):
        choose_options([[3, 5], [4, 9]], [[1.0, 0.0], [1.0, 0.0]], 6)
    assert choose_options([[3, 5], [4, 9]], [[1.0, 1.0], [1.0, 0.5]], 10**12) == [0, 1]
