"""What the authors' code computed, through the classes that training uses."""

import pytest

from conftest import ROOT
from golden import TOLERANCES, Case, check

CASES = sorted((ROOT / "tests/golden").glob("*.json"))


@pytest.mark.parametrize("inner_forward", ["full", "shared"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path, inner_forward):
    errors = check(Case.load(path), inner_forward)
    assert {key: error for key, error in errors.items() if not error <= TOLERANCES.get(key, 0.0)} == {}


def test_there_are_cases():
    assert len(CASES) == 12
