"""The cache of features: by content, once, in any order, whatever was interrupted, broken, or written by two at once."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from metric_models import images

from afa.metrics import cache
from afa.metrics.cache import FeatureStore, cached_features
from afa.metrics.frechet import FrechetDistance


class Means(FrechetDistance):
    """Mean colours as features; counts what it looks at."""

    name = "means"

    def __init__(self, weights="one"):
        self.identity = {"weights": weights}
        self.seen = 0

    identity = None  # given when made

    def features(self, images):
        self.seen += len(images)
        return np.stack([image.mean((0, 1)) for image in images]).astype(np.float32)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 4)


def expected(shown):
    return np.stack([image.mean((0, 1)) for image in shown]).astype(np.float32)


def test_features_are_computed_once(tmp_path):
    shown, first, second = images(10), Means(), Means()
    found = cached_features(first, lambda: shown, tmp_path)
    again = cached_features(second, lambda: shown, tmp_path)
    np.testing.assert_array_equal(found, expected(shown))
    np.testing.assert_array_equal(again, found)
    assert found.dtype == np.float32
    assert (first.seen, second.seen) == (10, 0)


def test_only_what_is_new_is_computed_and_order_does_not_matter(tmp_path):
    shown = images(10)
    cached_features(Means(), lambda: shown[:6], tmp_path)
    metric = Means()
    np.testing.assert_array_equal(cached_features(metric, lambda: shown[::-1], tmp_path), expected(shown[::-1]))
    assert metric.seen == 4


def test_an_image_that_comes_twice_is_looked_at_once(tmp_path):
    shown, metric = images(3) * 5, Means()
    np.testing.assert_array_equal(cached_features(metric, lambda: shown, tmp_path), expected(shown))
    assert metric.seen == 3


def test_images_of_equal_bytes_and_other_shapes_are_different(tmp_path):
    flat, tall = np.zeros((2, 8, 3), np.uint8), np.zeros((8, 2, 3), np.uint8)
    metric = Means()
    cached_features(metric, lambda: [flat, tall], tmp_path)
    assert metric.seen == 2


def test_other_weights_do_not_share_features(tmp_path):
    shown, other = images(4), Means("other")
    cached_features(Means(), lambda: shown, tmp_path)
    cached_features(other, lambda: shown, tmp_path)
    assert other.seen == 4


def test_an_interruption_loses_one_chunk(tmp_path):
    shown = images(10)

    def interrupted():
        yield from shown[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_features(Means(), interrupted, tmp_path)
    metric = Means()
    np.testing.assert_array_equal(cached_features(metric, lambda: shown, tmp_path), expected(shown))
    assert metric.seen == 2


def test_an_interrupted_write_is_computed_again(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            cached_features(Means(), lambda: images(3), tmp_path)
    metric = Means()
    np.testing.assert_array_equal(cached_features(metric, lambda: images(3), tmp_path), expected(images(3)))
    assert metric.seen == 3


def damage_end(data):
    return data[: len(data) // 2]


def damage_middle(data):
    """One byte of the features changed, as a failing disk does."""
    return data[:40] + bytes([data[40] ^ 255]) + data[41:]


@pytest.mark.parametrize(
    ("damage", "lost"), [(damage_end, 4), (damage_middle, 1), (lambda data: b"", 8), (lambda data: b"nonsense", 8)]
)
def test_what_is_broken_is_computed_again(tmp_path, damage, lost):
    shown = images(8)
    cached_features(Means(), lambda: shown, tmp_path, name="set")
    rows = next(tmp_path.rglob("*.bin"))
    rows.write_bytes(damage(rows.read_bytes()))
    metric = Means()
    np.testing.assert_array_equal(cached_features(metric, lambda: shown, tmp_path, name="set"), expected(shown))
    assert metric.seen == lost
    after = Means()
    cached_features(after, lambda: shown, tmp_path)
    assert after.seen == 0


def test_a_set_that_is_known_by_name_is_not_even_read(tmp_path):
    shown = images(6)
    first = cached_features(Means(), lambda: shown, tmp_path, name="coco")
    again = cached_features(Means(), lambda: pytest.fail("read again"), tmp_path, name="coco")
    np.testing.assert_array_equal(again, first)
    other = cached_features(Means(), lambda: shown[:2], tmp_path, name="another set")
    assert len(other) == 2


def test_a_broken_note_of_a_set_is_made_again(tmp_path):
    shown = images(6)
    cached_features(Means(), lambda: shown, tmp_path, name="set")
    note = next(tmp_path.rglob("sets/*.json"))
    note.write_bytes(note.read_bytes()[:40])
    np.testing.assert_array_equal(cached_features(Means(), lambda: shown, tmp_path, name="set"), expected(shown))


def test_no_images_are_no_set(tmp_path):
    with pytest.raises(ValueError, match="there are no images to compute features for means of"):
        cached_features(Means(), list, tmp_path)


def _fill(folder, start):
    """One of two processes: a different order, and half of the images in common."""
    cached_features(Means(), lambda: images(24)[start:] + images(24)[:start], Path(folder), name="shared")


def test_two_processes_may_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(str(tmp_path), start)) for start in (0, 12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    metric = Means()
    np.testing.assert_array_equal(cached_features(metric, lambda: images(24), tmp_path), expected(images(24)))
    assert metric.seen == 0
    assert not list(tmp_path.rglob(".writing-*"))


def test_features_of_many_images_are_found_without_reading_them_all_at_once(tmp_path):
    """What is in memory per image while a store is opened is its key and its place, not its features."""
    cached_features(Means(), lambda: images(10), tmp_path)
    store = FeatureStore(tmp_path, Means().identity)
    assert len(store.rows) == 10
    assert all(isinstance(part, np.memmap) for part in store.rows._parts)
