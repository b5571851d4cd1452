"""Laws of aspect-ratio buckets: little is cropped, a step is of one size, a pass sees all images, a run resumes to the same bits."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from test_training import aggregators, experts, images, interrupt_after, settings  # noqa: F401 (fixtures)
from tiny import sd_pipeline, sdxl_pipeline
from tiny_transformers import FLUX_SMALL, flux_pipeline

from afa.cli.main import main
from afa.cli.train import _plan
from afa.data.buckets import bucket_for, bucket_sizes, cropped, find_buckets, make_sizes, plan_lines
from afa.data.images import Crop, cut
from afa.data.registry import open_source
from afa.data.sources import Skipped
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.images import open_image, picture_size
from afa.training.cache import LatentCache, encode_cached
from afa.training.data import encode
from afa.training.finetune import finetune
from afa.training.finetune_settings import LoraSettings
from afa.training.loop import Trainer
from afa.training.order import images_of_step
from afa.training.prepare import encode_data, find_data
from afa.training.run import plan, train

SHAPES = [(40, 80), (48, 96), (80, 40), (60, 120), (64, 64), (50, 52), (96, 48), (30, 90), (70, 35), (32, 64), (33, 70), (100, 50)]


def write(folder, shapes=SHAPES):
    """Captioned images of some heights and widths, as kohya's users have them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (height, width) in enumerate(shapes):
        pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"picture {index}")
    return folder


@pytest.fixture
def bucketed(settings, tmp_path):  # noqa: F811
    return replace(settings, data=str(write(tmp_path / "shapes")), buckets=True, evaluate_every=6)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "multiple"), [(32, 8), (64, 16), (256, 8), (512, 8), (512, 16), (520, 8), (768, 32), (1024, 8), (1024, 24)])
def test_buckets_are_multiples_of_the_models_and_no_larger_than_the_square(resolution, multiple):
    resolution = -(-resolution // multiple) * multiple
    sizes = make_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes and len(sizes) >= 3
    assert all(height % multiple == 0 == width % multiple and height * width <= resolution**2 for height, width in sizes)
    assert {(width, height) for height, width in sizes} == set(sizes)


def test_the_sizes_are_those_of_kohyas_scripts():
    at_512 = {(256, side) for side in (832, 896, 960, 1024)} | {(320, 704), (320, 768), (384, 640), (448, 576), (512, 512)}
    assert {size for size in bucket_sizes(512, 64, 256, 1024) if size[0] <= size[1]} == at_512
    assert make_sizes(512, 8) == bucket_sizes(512, 64, 256, 1024)
    assert {(832, 1216), (896, 1152), (768, 1344), (640, 1536)} <= set(make_sizes(1024, 8))  # of SDXL's own list


def test_every_image_gets_the_bucket_that_crops_least_of_it():
    sizes, rng = make_sizes(512, 8), np.random.default_rng(0)
    for height, width in rng.integers(20, 3000, (300, 2)).tolist():
        chosen = bucket_for((height, width), sizes)
        assert cropped((height, width), chosen) == min(cropped((height, width), size) for size in sizes)
        assert bucket_for((width, height), sizes) == chosen[::-1]
    assert all(bucket_for(size, sizes) == size and cropped(size, size) == 0 for size in sizes)


@pytest.mark.parametrize("shape", [*SHAPES, (7, 900), (900, 7), (1, 1)])
@pytest.mark.parametrize("place", [None, (0, 1)])
def test_an_image_covers_its_bucket_and_what_is_cropped_is_what_was_said(shape, place):
    image, sizes = Image.fromarray(np.zeros((*shape, 3), np.uint8)), make_sizes(32, 8)
    bucket = bucket_for(shape, sizes)
    pixels, (height, width, top, left, tall, wide) = cut(image, Crop(32, place, bucket=bucket))
    assert pixels.shape == (3, *bucket) and (tall, wide) == bucket and (height, width) == shape
    scale = max(tall / height, wide / width)
    assert 0 <= top <= round(height * scale) - tall and 0 <= left <= round(width * scale) - wide
    assert (pixels == -1).all()
    assert 1 - tall * wide / (height * scale * width * scale) == pytest.approx(cropped(shape, bucket))


def test_a_bucket_that_is_the_square_is_the_square():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8))
    for place in (None, (3, 1)):
        one, other = cut(image, Crop(32, place)), cut(image, Crop(32, place, bucket=(32, 32)))
        assert torch.equal(one[0], other[0]) and one[1] == other[1]


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("turn", [None, *range(1, 9)])
def test_the_size_in_a_header_is_that_of_the_opened_picture(kind, turn):
    if kind not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow writes no {kind}")
    exif = Image.Exif()
    if turn is not None:
        exif[0x0112] = turn
    data = saved(Image.new("RGB", (20, 10)), kind, exif=exif)
    assert picture_size(data) == open_image(data).size[::-1] == ((20, 10) if (turn or 1) > 4 else (10, 20))
    assert picture_size(saved(Image.new("RGBA", (20, 10), (1, 2, 3, 0)), "PNG")) == (10, 20)


def test_images_without_a_size_are_left_out_where_they_are_encoded(bucketed, tmp_path):
    folder = Path(bucketed.data)
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:20])
    Image.new("1", (20_000, 9_000)).save(folder / "05.png")
    source = find_data(bucketed)
    buckets = find_buckets(source.samples, 32, make_sizes(32, 8))
    assert [index for index, size in enumerate(buckets.originals) if size is None] == [3, 5]
    assert sum(one["images"] for one in buckets.facts()["images"]) == 10
    data, held_out = encode_data(replace(bucketed, max_skipped=0.5), source, 32, sd_pipeline().vae, buckets=buckets)
    assert len(data) + len(held_out) == 10 and source.skipped.names["not readable as an image"] == ["03.png", "05.png"]


# --- the order ----------------------------------------------------------------------------------------------------------

GROUPS = [list(range(7)), list(range(7, 10)), [10], [11] * 3 + list(range(12, 40))]


@pytest.mark.parametrize("size", [1, 2, 5, 8, 64])
@pytest.mark.parametrize("groups", [GROUPS, GROUPS[:1], GROUPS[1:3], GROUPS[2:3]])
def test_every_pass_sees_every_image_and_no_image_is_more_than_a_step_ahead(groups, size):
    wanted, seen, step = Counter(image for group in groups for image in group), Counter(), 0
    count = sum(wanted.values())
    for passes in range(1, 5):
        end = sum(-(-passes * len(group) // size) for group in groups)
        while step < end:
            taken = images_of_step(groups, step, size, seed=3)
            assert len(taken) == size and any(set(taken) <= set(group) for group in groups)
            seen.update(taken)
            step += 1
        assert all(seen[image] >= passes * times for image, times in wanted.items())
        for group in groups:
            assert sum(seen[image] for image in set(group)) - passes * len(group) < size
    assert step * size < 4 * count + size * len(groups)


def test_the_order_depends_on_the_seed_and_buckets_take_turns():
    def of(seed, steps=range(12)):
        return [images_of_step(GROUPS, step, 2, seed) for step in steps]

    assert of(1) == of(1) == [images_of_step(GROUPS, step, 2, 1) for step in reversed(range(12))][::-1]
    assert of(1) != of(2)
    turns = [next(place for place, group in enumerate(GROUPS) if step[0] in group) for step in of(1, range(20))]
    assert turns != sorted(turns) and len(set(turns)) > 1


def test_a_single_size_is_ordered_as_it_was_before_there_were_buckets():
    size, count = 3, 10
    for step in range(9):
        places = [divmod(place, count) for place in range(step * size, (step + 1) * size)]
        assert images_of_step([list(range(count))], step, size, 5) == [
            int(np.random.default_rng((5, epoch)).permutation(count)[place]) for epoch, place in places
        ]


# --- encoding -----------------------------------------------------------------------------------------------------------


def work_of(folder, crops=1):
    samples = open_source(str(folder)).samples
    buckets = find_buckets(samples, 32, make_sizes(32, 8))
    return [
        (sample, [Crop(32, None if crops == 1 else (index, crop), bucket=bucket) for crop in range(crops)])
        for index, (sample, bucket) in enumerate(zip(samples, buckets.chosen, strict=True))
    ]


@pytest.mark.parametrize("crops", [1, 3])
def test_latents_of_all_sizes_are_those_of_each_image_alone_cached_or_not(tmp_path, crops):
    work, vae = work_of(write(tmp_path / "data"), crops), sd_pipeline().vae
    found = encode(work, vae, 4, Skipped())
    cached = [encode_cached(work, vae, 4, Skipped(), cache=LatentCache(tmp_path / "cache", vae)) for _ in range(2)]
    assert len(found) == len(SHAPES) and len({size for _, (crop, *_) in work for size in [crop.size]}) > 3
    for index, item in enumerate(work):
        alone = encode([item], vae, 4, Skipped())
        rows = list(range(crops * index, crops * (index + 1)))
        for one in (found, *cached):
            assert torch.allclose(one.moments[rows], alone.moments, atol=1e-5)
            assert torch.equal(one.sizes[rows], alone.sizes) and one.captions[crops * index] == f"picture {index}"
    assert {one.digest for one in cached} == {found.digest}
    assert cached[0].groups == found.groups and sorted(image for group in found.groups for image in group) == list(range(len(SHAPES)))


def test_the_cache_shares_squares_with_runs_without_buckets(tmp_path, monkeypatch):
    folder, vae = write(tmp_path / "data", [(64, 64), (50, 50)]), sd_pipeline().vae
    squares = [(sample, [Crop(32)]) for sample in open_source(str(folder)).samples]
    encode_cached(squares, vae, 4, Skipped(), cache=LatentCache(tmp_path / "cache", vae))
    monkeypatch.setattr(type(vae), "encode", lambda self, x: pytest.fail("encoded again"))
    assert len(encode_cached(work_of(folder), vae, 4, Skipped(), cache=LatentCache(tmp_path / "cache", vae))) == 2


# --- runs ---------------------------------------------------------------------------------------------------------------


def seen_in(monkeypatch):
    """The sizes of the latents of every step."""
    sizes, before = [], Trainer._backward

    def backward(self, drawn, micro):
        sizes.append([tuple(part.batch.latents.shape[-2:]) for part in self._parts(drawn, micro)])
        return before(self, drawn, micro)

    monkeypatch.setattr(Trainer, "_backward", backward)
    return sizes


def test_training_takes_all_sizes_a_step_one_and_resumes_to_the_same_bits(bucketed, tmp_path, monkeypatch):
    run = replace(bucketed, crops=2, flip=True, cache=str(tmp_path / "cache"), bucket_sides=[16, 48])
    sizes = seen_in(monkeypatch)
    whole = train(replace(run, output=str(tmp_path / "whole")))
    assert all(len(step) == 1 for step in sizes) and len({step[0] for step in sizes}) > 2
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    record = train(run)
    assert record["history"] == whole["history"] and record["held_out_loss"] == whole["held_out_loss"]
    assert record["weights_moved"] is not None
    kept = json.loads((Path(run.output) / "afa.json").read_text())["training"]["settings"]
    assert kept["buckets"] is True and kept["bucket_sides"] == [16, 48] and kept["bucket_step"] is None


def test_a_run_with_buckets_is_not_gone_on_with_without_them(bucketed, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(bucketed)
    with pytest.raises(UserError, match="--buckets"):
        train(replace(bucketed, buckets=False))


def test_a_step_of_buckets_is_the_same_however_it_is_divided(bucketed, tmp_path):
    one, other = (
        replace(bucketed, output=str(tmp_path / name), batch_size=size, accumulate=parts, steps=1)
        for name, size, parts in (("one", 4, 1), ("other", 2, 2))
    )
    assert train(one)["history"][-1]["training_loss"] == pytest.approx(train(other)["history"][-1]["training_loss"], rel=1e-4)
    for name, value in aggregators(one).items():
        assert torch.allclose(value, aggregators(other)[name], atol=1e-4)


def test_two_processes_make_the_steps_of_one(bucketed, tmp_path):
    run = replace(bucketed, steps=2, evaluate_every=2)
    alone = train(replace(run, batch_size=4, output=str(tmp_path / "alone")))
    one, other = in_processes(lambda: train(replace(run, cache=str(tmp_path / "cache")))["history"])
    assert [entry["held_out_loss"] for entry in one] == [entry["held_out_loss"] for entry in other]
    assert [entry["held_out_loss"] for entry in one] == pytest.approx([entry["held_out_loss"] for entry in alone["history"]], rel=1e-4)


def test_sdxl_is_told_the_size_the_crop_and_the_bucket_of_each_image(tmp_path, bucketed, monkeypatch):
    for seed, name in enumerate(("one", "two")):
        sdxl_pipeline(seed).save_pretrained(tmp_path / name)
    run = replace(bucketed, experts=[str(tmp_path / "one"), str(tmp_path / "two")], steps=2)
    planned = plan(run)
    unet, told = type(planned.ensemble.denoiser), []
    before = unet.forward

    def forward(self, sample, *args, **kwargs):
        told.append((tuple(sample.shape[-2:]), kwargs["added_cond_kwargs"]["time_ids"].clone()))
        return before(self, sample, *args, **kwargs)

    monkeypatch.setattr(unet, "forward", forward)
    train(run, planned)
    assert len({size for size, _ in told}) > 1
    for (height, width), ids in told:
        assert all((8 * height, 8 * width) == tuple(row[4:].tolist()) for row in ids)
        assert all((int(row[0]), int(row[1])) in SHAPES for row in ids)
        for original_height, original_width, top, left, tall, wide in ids.tolist():
            scale = max(tall / original_height, wide / original_width)
            assert top == (round(original_height * scale) - tall) // 2 and left == (round(original_width * scale) - wide) // 2


def test_transformers_train_on_buckets_of_whole_patches(tmp_path, bucketed, monkeypatch):
    for seed, name in enumerate(("one", "two")):
        flux_pipeline(seed, **FLUX_SMALL).save_pretrained(tmp_path / name)
    run = replace(bucketed, experts=[str(tmp_path / "one"), str(tmp_path / "two")], steps=4, evaluate_every=4, resolution=64)
    planned = plan(run)
    multiple = 8 * planned.ensemble.denoiser.interface.patch
    assert all(side % multiple == 0 for size in planned.buckets.sizes for side in size)
    sizes = seen_in(monkeypatch)
    assert train(run, planned)["steps"] == 4
    assert len({step[0] for step in sizes}) > 1


def test_a_lora_is_trained_on_buckets_as_an_ensemble_is(bucketed, monkeypatch):
    sizes = seen_in(monkeypatch)
    shared = {name: getattr(bucketed, name) for name in ("data", "output", "steps", "batch_size", "held_out", "resolution", "buckets", "device")}
    assert finetune(LoraSettings(expert=bucketed.experts[0], rank=2, evaluate_every=6, lr=1e-3, **shared))["steps"] == 6
    assert len({step[0] for step in sizes}) > 2


def test_a_student_takes_samplings_that_are_squares_and_images_of_all_sizes(bucketed, tmp_path, monkeypatch):
    from afa.distillation.run import distill
    from afa.distillation.settings import DistillSettings

    Ensemble.from_experts(bucketed.experts, aggregator="mean").save(tmp_path / "ensemble")
    run = DistillSettings(
        ensemble=str(tmp_path / "ensemble"), data=bucketed.data, output=str(tmp_path / "student"), steps=5, batch_size=4, image_share=0.5, buckets=True,
        recombine=0, trajectory_steps=2, resolution=32, held_out=2, evaluate_every=5, lora=2, lr=1e-3, guidance=2.0, device="cpu",
    )  # fmt: skip
    sizes = seen_in(monkeypatch)
    whole = distill(replace(run, output=str(tmp_path / "whole")))
    assert len({step[-1] for step in sizes}) > 2
    assert all(step[0] == (4, 4) for step in sizes) and {len(step) for step in sizes} == {1, 2}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            distill(run)
    assert distill(run)["history"] == whole["history"]


def test_a_loss_in_two_parts_is_the_loss_of_the_whole(bucketed, tmp_path, monkeypatch):
    """Where samplings and images have one size, taking them apart changes nothing."""
    from afa.distillation.run import distill
    from afa.distillation.settings import DistillSettings

    squares = write(tmp_path / "squares", [(40, 40)] * 10)
    Ensemble.from_experts(bucketed.experts, aggregator="mean").save(tmp_path / "ensemble")
    run = DistillSettings(
        ensemble=str(tmp_path / "ensemble"), data=str(squares), output=str(tmp_path / "one"), steps=1, batch_size=6, image_share=0.33,
        recombine=0, trajectory_steps=2, resolution=32, held_out=2, evaluate_every=1, lora=2, lr=1e-3, guidance=2.0, device="cpu", caption_dropout=0.0,
    )  # fmt: skip
    together, before = distill(run), Trainer._parts

    def apart(self, drawn, micro):
        (whole,) = before(self, drawn, micro)
        return [whole.part(0, self.asked), whole.part(self.asked, len(whole.rows))]

    monkeypatch.setattr(Trainer, "_parts", apart)
    parted = distill(replace(run, output=str(tmp_path / "two")))
    for one, other in zip(together["history"][1:], parted["history"][1:], strict=True):
        assert one["training_loss"] == pytest.approx(other["training_loss"], rel=1e-4)
        assert one["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-4)


def test_a_plan_names_every_bucket_and_what_is_cropped(bucketed, capsys):
    facts = plan(bucketed).facts()["buckets"]
    assert sum(one["images"] for one in facts["images"]) == len(SHAPES)
    assert 0 <= facts["cropped"] < facts["cropped_by_squares"] < 1 and facts["enlarged"] >= 0
    arguments = [bucketed.experts[0], "--rank", "2", "--data", bucketed.data, "--output", bucketed.output, "--resolution", "32", "--device", "cpu"]
    assert main(["finetune", *arguments, "--buckets", "--dry-run", "--batch-size", "2"]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[3].startswith("buckets ")
    assert all(line in _plan(plan(bucketed).facts()) for line in plan_lines({"buckets": facts, "images_a_step": 2}, 13))
    assert all(f"{one['width']} × {one['height']} ({one['images']}" in told for one in facts["images"])
    assert "of the pixels are cropped, by squares" in told
    assert not Path(bucketed.output).exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bucket_step": 12}, "--bucket-step 12 is not a multiple of 8 pixels; 16 is the next"),
        ({"bucket_sides": [64, 128]}, "--bucket-sides 64 128 must have --resolution 32 between them"),
        ({"bucket_sides": [16]}, "--bucket-sides 16 is no pair"),
        ({"buckets": False, "bucket_step": 8}, "--bucket-step 8 is of buckets"),
        ({"buckets": False, "bucket_sides": [16, 64]}, "--bucket-sides 16 64 is of buckets"),
    ],
)
def test_steps_and_sides_that_make_no_buckets_are_refused(bucketed, change, told):
    with pytest.raises(UserError, match=told):
        plan(replace(bucketed, **change))


def test_a_reward_that_cannot_judge_a_bucket_is_refused_before_anything_is_encoded(bucketed, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(images, captions):\n    return images.reshape(len(images), 3, 32, 32).mean((1, 2, 3))\n")
    run = replace(bucketed, objective="mse+reward", reward=str(reward))
    with pytest.raises(UserError, match="cannot judge images of .* a bucket of --buckets"):
        plan(replace(run, bucket_sides=[16, 32]))
    reward.write_text("def reward(images, captions):\n    return images.mean((1, 2, 3))\n")
    assert plan(run).buckets is not None


def test_images_for_captions_alone_are_not_cut(tmp_path, settings):  # noqa: F811
    from afa.distillation.settings import DistillSettings

    with pytest.raises(UserError, match="--buckets is of training on images"):
        DistillSettings(ensemble="e", data=settings.data, output=str(tmp_path / "s"), image_share=0.0, buckets=True)
