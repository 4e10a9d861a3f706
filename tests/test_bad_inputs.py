"""The corpus of bad input: every input is used as it is meant, or refused with one sentence, and the page says so."""

import pytest
from corpus import all_cases
from corpus.case import Case, Outcome, run_case
from corpus.page import PAGE, render

CASES = all_cases()
OUTCOMES: dict[Case, Outcome] = {}
"""What came of the cases so far."""


def outcome_of(case, folder):
    if case not in OUTCOMES:
        folder.mkdir(parents=True)
        OUTCOMES[case] = run_case(case, folder)
    return OUTCOMES[case]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}, {case.name}")
def test_an_input_is_used_or_refused(tmp_path, case):
    outcome = outcome_of(case, tmp_path / "input")
    assert not outcome.fault, outcome.fault
    assert (outcome.verdict, outcome.written) == (case.expected, []), outcome.sentence


def test_there_are_many_and_each_has_its_name():
    assert len(CASES) >= 250
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES)


def test_the_page_says_what_happens(tmp_path):
    """Where it does not, run `python tools/bad_inputs.py`."""
    outcomes = {case: outcome_of(case, tmp_path / str(number)) for number, case in enumerate(CASES)}
    assert PAGE.read_text("utf-8").splitlines() == render(outcomes).splitlines()
