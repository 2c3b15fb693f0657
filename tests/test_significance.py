"""The interval of an accuracy and the test of a difference, by hand and against SciPy."""

import pytest
from scipy.stats import binomtest

from base.significance import mcnemar, wilson_interval


def test_wilson_interval_by_hand() -> None:
    # z = 1.959964; 8 of 10: centre (0.8 + 0.192073) / 1.384146, half-width 0.226434
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0, 0.277533), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.722467, 1), abs=1e-6)
    with pytest.raises(ValueError, match="give at least one"):
        wilson_interval(0, 0)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 32
    assert mcnemar(1, 7) == 2 * (1 + 8) / 256


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 9), (40, 61), (2000, 2300)])
def test_interval_and_test_equal_those_of_scipy(first: int, second: int) -> None:
    both = first + second
    exact = binomtest(first, both)
    assert mcnemar(first, second) == pytest.approx(exact.pvalue, rel=1e-9)
    expected = exact.proportion_ci(0.95, method="wilson")
    assert wilson_interval(first, both) == pytest.approx((expected.low, expected.high), abs=1e-9)
