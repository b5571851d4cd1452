"""A list of names is printed whatever else is given: exit 0, on stdout."""

import pytest
from hostile import afa


@pytest.mark.parametrize(("flag", "name"), [("methods", "prediction_router"), ("metrics", "imagereward"), ("protocol", "drawbench")])
@pytest.mark.parametrize("more", [[], ["--seeds", "3"], ["--ensemble", "nowhere"]])
def test_what_evaluate_takes_is_listed_without_other_arguments(flag, name, more):
    run = afa("evaluate", *more, f"--{flag}", "list")
    assert run.code == 0 and name in run.out and not run.err


def test_a_list_that_is_asked_for_among_names_is_no_list():
    assert afa("evaluate", "--methods", "list", "afa").code == 2
