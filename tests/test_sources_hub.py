"""Data sets of the hub: read by the same loader from folders in their form, without a network."""

import pytest
from test_sources import CAPTIONS, PICTURES, write_parquet

from afa import UserError
from afa.data.hub import from_hub
from afa.data.registry import open_source
from afa.data.sources import Columns, Skipped


def test_a_data_set_of_the_hub_is_read_as_others_are(tmp_path):
    """A folder in the form of a hub's data set: the same loader, without a network."""
    write_parquet(tmp_path)
    samples = list(from_hub(str(tmp_path), Columns(), Skipped()))
    assert [sample.caption for sample in samples] == CAPTIONS and [sample.read() for sample in samples] == PICTURES


def test_a_data_set_of_the_hub_can_be_streamed(tmp_path):
    write_parquet(tmp_path)
    samples = list(from_hub(str(tmp_path), Columns(), Skipped(), limit=4))
    assert [sample.caption for sample in samples] == CAPTIONS[:4] and [sample.read() for sample in samples[::-1]] == PICTURES[3::-1]
    assert len({sample.mark for sample in samples}) == 4
    again = list(from_hub(str(tmp_path), Columns(), Skipped(), limit=99))
    assert [sample.mark for sample in again][:4] == [sample.mark for sample in samples] and len(again) == 6


def test_a_stream_that_breaks_is_one_sentence(tmp_path, monkeypatch):
    from datasets import IterableDataset

    write_parquet(tmp_path)
    original = IterableDataset.__iter__

    def broken(self):
        for row in original(self):
            yield row
            raise ConnectionError("the other side has gone")

    monkeypatch.setattr(IterableDataset, "__iter__", broken)
    with pytest.raises(UserError, match="could not be streamed to its 4 rows: the other side has gone"):
        list(from_hub(str(tmp_path), Columns(), Skipped(), limit=4))


def test_a_data_set_that_is_nowhere_is_one_sentence():
    with pytest.raises(UserError, match="--data nobody/nothing is no file or folder, and cannot be loaded from the hub"):
        open_source("nobody/nothing")
