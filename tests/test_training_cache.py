"""Laws of the cache: the same training with it as without, nothing computed twice, nothing stale, nothing lost by a crash."""

from dataclasses import replace

import pytest
import torch
from processes import in_processes
from test_sources import PICTURES, picture, write_folder
from test_training import aggregators, experts, images, interrupt_after, settings  # noqa: F401 (fixtures)
from tiny import sd_pipeline, sdxl_pipeline

from afa.data.images import Crop
from afa.data.registry import open_source
from afa.data.sources import Skipped
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.store import RowStore
from afa.training.cache import LatentCache, TextCache, caption_key, content_hash, encode_cached
from afa.training.data import encode
from afa.training.run import plan, train

KEYS = [caption_key(str(index)) for index in range(9)]

# --- rows on disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit_in_any_order(tmp_path, dtype):
    rows = torch.randn(4, 3, 5).to(dtype)
    store = RowStore(tmp_path, (3, 5), dtype)
    store.add(KEYS[:3], rows[:3])
    store.add(KEYS[3:4], rows[3:])
    for again in (store, RowStore(tmp_path, (3, 5), dtype)):
        assert torch.equal(again.read([KEYS[index] for index in (3, 0, 2, 2)]), rows[[3, 0, 2, 2]])
        assert KEYS[1] in again and KEYS[5] not in again and len(again) == 4


def test_two_writers_do_not_disturb_each_other(tmp_path):
    one, other = RowStore(tmp_path, (2,), torch.float32), RowStore(tmp_path, (2,), torch.float32)
    for index in range(4):
        (one, other)[index % 2].add([KEYS[index]], torch.full((1, 2), float(index)))
    one.refresh()
    assert one.read(KEYS[:4])[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("ending", [".bin", ".keys"])
def test_a_crash_while_writing_costs_only_the_last_row(tmp_path, ending):
    store = RowStore(tmp_path, (2,), torch.float32)
    store.add(KEYS[:3], torch.arange(6.0).view(3, 2))
    file = tmp_path / f"part-00000{ending}"
    file.write_bytes(file.read_bytes()[:-3])
    again = RowStore(tmp_path, (2,), torch.float32)
    assert len(again) == 2 and again.read(KEYS[:2]).tolist() == [[0, 1], [2, 3]]
    again.add(KEYS[2:3], torch.tensor([[4.0, 5.0]]))
    assert RowStore(tmp_path, (2,), torch.float32).read(KEYS[:3]).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_rows_of_another_shape_are_refused(tmp_path):
    RowStore(tmp_path, (2,), torch.float32)
    with pytest.raises(UserError, match="keeps rows of .* give another --cache"):
        RowStore(tmp_path, (3,), torch.float32)
    with pytest.raises(ValueError, match="1 rows of"):
        RowStore(tmp_path, (2,), torch.float32).add(KEYS[:1], torch.zeros(1, 3))


def test_a_hash_of_a_model_is_of_its_weights_and_its_settings():
    one, same, other = sd_pipeline(0).vae, sd_pipeline(0).vae, sd_pipeline(0).vae
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    assert content_hash(one) == content_hash(same) != content_hash(other)
    same.register_to_config(force_upcast=False)
    assert content_hash(one) != content_hash(same)


# --- images and captions ----------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return [(sample, [Crop(32), Crop(32, (0, 1), True)]) for sample in open_source(str(write_folder(folder))).samples]


def cache_of(tmp_path, vae):
    return LatentCache(tmp_path / "cache", vae)


def test_latents_of_the_cache_are_those_of_the_vae(work, tmp_path):
    vae = sd_pipeline().vae
    wanted = encode(work, vae, 4, Skipped())
    for _ in range(2):  # made, then read
        found = encode_cached(work, vae, 4, Skipped(), cache=cache_of(tmp_path, vae))
        assert torch.allclose(found.moments[list(range(12))], wanted.moments, atol=1e-6)
        assert torch.equal(found.sizes, wanted.sizes) and found.captions == wanted.captions and found.digest == wanted.digest
        assert len(found) == 6


def test_what_is_there_is_neither_read_nor_encoded_again(work, tmp_path, monkeypatch):
    vae = sd_pipeline().vae
    encode_cached(work[:4], vae, 4, Skipped(), cache=cache_of(tmp_path, vae))
    seen = []
    monkeypatch.setattr(type(vae), "encode", lambda self, x: seen.append(len(x)) or pytest.fail("encoded again"))
    encode_cached(work[:4], vae, 4, Skipped(), cache=cache_of(tmp_path, vae))
    assert not seen


def test_an_image_that_changed_is_encoded_again(work, tmp_path):
    vae = sd_pipeline().vae
    before = encode_cached(work, vae, 4, Skipped(), cache=cache_of(tmp_path, vae))
    (tmp_path / "data" / "2.jpg").write_bytes(picture(99))
    fresh = [(sample, [Crop(32), Crop(32, (0, 1), True)]) for sample in open_source(str(tmp_path / "data")).samples]
    after = encode_cached(fresh, vae, 4, Skipped(), cache=cache_of(tmp_path, vae))
    changed = [not torch.equal(before.moments[[row]], after.moments[[row]]) for row in range(12)]
    assert changed == [row // 2 == 2 for row in range(12)] and before.digest != after.digest


def test_another_vae_has_rows_of_its_own(work, tmp_path):
    one, other = sd_pipeline(0).vae, sd_pipeline(1).vae
    first, second = (encode_cached(work, vae, 4, Skipped(), cache=cache_of(tmp_path, vae)) for vae in (one, other))
    assert not torch.allclose(first.moments[[0]], second.moments[[0]])


def test_what_cannot_be_read_is_left_out_of_the_cache_too(work, tmp_path):
    (tmp_path / "data" / "1.jpg").write_bytes(PICTURES[1][:300])
    vae, skipped = sd_pipeline().vae, Skipped()
    found = encode_cached(work, vae, 4, skipped, cache=cache_of(tmp_path, vae))
    assert len(found) == 5 and skipped.names == {"not readable as an image": ["1.jpg"]}


def test_captions_are_kept_by_what_they_say(tmp_path):
    cache = TextCache(tmp_path, "a" * 64, [((2, 3), torch.float32), ((4,), torch.bfloat16)])
    parts = torch.randn(2, 2, 3), torch.randn(2, 4).bfloat16()
    assert cache.missing(["b", "a", "b"]) == ["b", "a"]
    cache.add(["a", "b"], parts)
    assert cache.missing(["b", "a", "c"]) == ["c"]
    states, pooled = cache.read(["b", "a"])
    assert torch.equal(states, parts[0][[1, 0]]) and torch.equal(pooled, parts[1][[1, 0]])


# --- training ---------------------------------------------------------------------------------------------------------


def equal(one, other, tolerance=1e-6):
    first, second = aggregators(one), aggregators(other)
    return max(float((tensor - second[name]).abs().max()) for name, tensor in first.items()) <= tolerance


def test_training_from_a_cache_equals_training_without(settings, tmp_path, capsys):  # noqa: F811
    plain = replace(settings, output=str(tmp_path / "plain"), lr=1e-4, steps=2)
    wanted = train(plain)
    for name in ("first", "second"):
        run = replace(plain, output=str(tmp_path / name), cache=str(tmp_path / "cache"))
        record = train(run)
        assert equal(plain, run)
        assert [entry["held_out_loss"] for entry in record["history"]] == pytest.approx([entry["held_out_loss"] for entry in wanted["history"]], rel=1e-5)
        told = capsys.readouterr().err
        assert ("10 images to put into the cache" in told) == (name == "first") == ("10 captions to put into the cache" in told)


def test_vae_and_text_encoders_leave_the_memory(settings, tmp_path):  # noqa: F811
    planned = plan(replace(settings, cache=str(tmp_path / "cache"), steps=2))
    train(planned.settings, planned)
    encoders = [encoder for expert in planned.ensemble.experts for encoder in expert.text_encoders]
    assert all(parameter.is_meta for module in (planned.ensemble.frame.vae, *encoders) for parameter in module.parameters())
    assert Ensemble.load(settings.output).training["steps"] == 2


def test_an_ensemble_that_belongs_to_somebody_else_stays_whole(settings, experts, tmp_path):  # noqa: F811
    shared = Ensemble.from_experts(experts, **settings.aggregator_options())
    run = replace(settings, cache=str(tmp_path / "cache"), steps=2)
    train(run, plan(run, shared))
    assert not any(parameter.is_meta for encoder in shared.text_encoders for parameter in encoder.parameters())


def test_a_run_from_a_cache_resumes_to_the_same_bits(settings, tmp_path, monkeypatch):  # noqa: F811
    run = replace(settings, cache=str(tmp_path / "cache"), crops=2, steps=3)
    whole = train(replace(run, output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert train(run)["history"] == whole["history"]


def test_sdxl_trains_from_a_cache(settings, tmp_path):  # noqa: F811
    places = []
    for seed in range(2):
        sdxl_pipeline(seed).save_pretrained(tmp_path / f"xl{seed}")
        places.append(str(tmp_path / f"xl{seed}"))
    plain = replace(settings, experts=places, output=str(tmp_path / "plain"), steps=2, lr=1e-4)
    train(plain)
    train(replace(plain, output=settings.output, cache=str(tmp_path / "cache")))
    assert equal(plain, settings)


def test_a_disk_without_room_is_one_sentence_before_anything_is_written(settings, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match=r"--cache .* needs .* GB more, and its disk has 0.0 GB left; give another place"):
        train(replace(settings, cache=str(tmp_path / "cache")))


def test_two_processes_fill_one_cache(settings, tmp_path):  # noqa: F811
    """Each its share: together every row once."""
    run = replace(settings, cache=str(tmp_path / "cache"), steps=2, lr=1e-4)
    in_processes(lambda: train(run))
    keys = [line for file in (tmp_path / "cache").glob("latents-*/moments/*/*.keys") for line in file.read_text().split()]
    assert len(keys) == len(set(keys)) == 10 and len(list((tmp_path / "cache").glob("latents-*/moments/*/*.keys"))) == 2
    alone = replace(run, cache=None, batch_size=4, output=str(tmp_path / "alone"))
    train(alone)
    assert equal(alone, run)
