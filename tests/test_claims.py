"""An output folder belongs to the settings it was begun with, once something has been made in it."""

import pytest

from afa.errors import UserError
from afa.fingerprint import NOTE, check_claim, claim


def test_the_same_settings_may_come_back(tmp_path):
    for _ in range(2):
        claim(tmp_path / "out", {"steps": 3, "sizes": (1, 2)}, "the search")
        (tmp_path / "out" / "made").touch()


def test_other_settings_are_refused_with_both_values(tmp_path):
    claim(tmp_path, {"batch_size": 3, "the model's hash": "a"}, "the search")
    (tmp_path / "made").touch()
    with pytest.raises(UserError, match=r"the search in .* was begun with --batch-size 3 \(now 4\), the model's hash a \(now b\); use the same"):
        claim(tmp_path, {"batch_size": 4, "the model's hash": "b"}, "the search")


def test_a_folder_in_which_nothing_has_been_made_binds_nobody(tmp_path):
    """Whoever mistyped an option may correct it."""
    for steps in (3, 4):
        claim(tmp_path, {"steps": steps}, "the search")
    (tmp_path / "made").touch()
    check_claim(tmp_path, {"steps": 4}, "the search")


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="holds other files"):
        claim(tmp_path, {}, "the search")
    with pytest.raises(UserError, match="is a file; give a folder"):
        claim(tmp_path / "mine", {}, "the search")
    assert not (tmp_path / NOTE).exists()
