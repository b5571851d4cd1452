"""Laws of training, on tiny real experts and real image folders."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from safetensors.torch import load_file
from tiny import ONE_LEVEL, sd_pipeline, sdxl_pipeline

from afa import Ensemble, UserError
from afa.data.images import Crop
from afa.data.registry import open_source
from afa.data.sources import Skipped
from afa.training.conditions import Conditions
from afa.training.data import Encoded, encode, split
from afa.training.loop import Trainer
from afa.training.run import plan, train
from afa.training.settings import TrainSettings

MADE: dict[str, Any] = {}  # what many files read, once: a fixture that they import is another one in each of them


def once(name, make):
    if name not in MADE:
        MADE[name] = make()
    return MADE[name]


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    """Two SD experts with text encoders of their own, as folders."""
    return once("experts", lambda: write_experts(tmp_path_factory.mktemp("experts")))


def write_experts(folder):
    for seed, name in enumerate(("photo", "paint")):
        sd_pipeline(seed, **ONE_LEVEL).save_pretrained(folder / name)
    return [str(folder / "photo"), str(folder / "paint")]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Ten captioned images of several sizes."""
    return once("images", lambda: write_images(tmp_path_factory.mktemp("images")))


def write_images(folder):
    rng = np.random.default_rng(0)
    lines = []
    for index in range(10):
        Image.fromarray(rng.integers(0, 255, (40 + index, 48, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def small_settings(experts, images, output):
    small = {"hidden": 8, "heads": 2, "depth": 1, "resolution": 32, "batch_size": 2, "held_out": 2}
    return TrainSettings(experts=experts, data=str(images), output=str(output), steps=6, evaluate_every=2, lr=1e-2, device="cpu", **small)


@pytest.fixture
def settings(experts, images, tmp_path):
    return small_settings(experts, images, tmp_path / "out")


@pytest.fixture(scope="session")
def trained(experts, images, tmp_path_factory):
    """A complete run of `settings`, and its record; only to be read."""

    def make():
        run = small_settings(experts, images, tmp_path_factory.mktemp("trained") / "out")
        return run, train(run)

    return once("trained", make)


def aggregators(settings):
    return load_file(Path(settings.output) / "aggregators.safetensors")


def interrupt_after(monkeypatch, step):
    """Press Ctrl-C while that step is running."""
    original = Trainer._after_step

    def after(self, loss):
        original(self, loss)
        if self.progress.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_after_step", after)


def test_resumed_training_equals_uninterrupted_and_other_options_are_refused_by_name(settings, trained, monkeypatch):
    whole_run, whole = trained
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt, match="after step 3"):
            train(settings)
    assert not (Path(settings.output) / "afa.json").exists()
    with pytest.raises(UserError, match=r"--lr 0.01 \(now 0.5\)"):
        train(replace(settings, lr=0.5))
    resumed = train(settings)
    same = ("history", "steps", "held_out_loss", "difference_to_untrained", "weights_moved")
    assert all(resumed[name] == whole[name] for name in same) and resumed["steps"] == 6
    expected = aggregators(whole_run)
    assert all(torch.equal(value, expected[name]) for name, value in aggregators(settings).items())
    assert [path.name for path in (Path(settings.output) / ".training").iterdir()] == ["last.pt"]


def test_a_complete_run_is_not_repeated(trained):
    settings, first = trained
    before = (Path(settings.output) / "afa.json").stat().st_mtime_ns
    assert train(settings) == first
    assert (Path(settings.output) / "afa.json").stat().st_mtime_ns == before


def test_training_lowers_the_held_out_loss_and_keeps_the_best(settings):
    record = train(replace(settings, steps=15, lr=4e-3, ema=0.8, evaluate_every=5))
    assert record["held_out_loss"]["trained"]["value"] < record["held_out_loss"]["untrained"]["value"]
    measured = {entry["step"]: entry["held_out_loss"] for entry in record["history"]}
    assert record["held_out_loss"]["trained"]["value"] == pytest.approx(min(measured.values()), rel=1e-6)
    assert measured[record["best_step"]] == min(measured.values())
    assert measured[0] == pytest.approx(record["held_out_loss"]["untrained"]["value"], rel=1e-5)


def test_training_stops_when_the_held_out_loss_no_longer_falls(settings):
    record = train(replace(settings, steps=50, lr=0.0, evaluate_every=2, patience=2))
    assert record["steps"] == 4 and record["best_step"] == 0


def test_trained_ensemble_loads_and_says_how_it_was_trained(trained):
    settings, record = trained
    ensemble = Ensemble.load(settings.output)
    assert ensemble.training == json.loads(json.dumps(record))
    assert ensemble.names == ("photo", "paint") and record["difference_to_best_expert"]["n"] == 2


def test_checkpointing_changes_memory_not_results(settings, trained):
    other = replace(settings, gradient_checkpointing=True)
    train(other)
    expected = aggregators(trained[0])
    assert all(torch.allclose(value, expected[name], atol=1e-5) for name, value in aggregators(other).items())


def test_a_prediction_router_trains(settings):
    record = train(replace(settings, placement="out", steps=2))
    assert record["steps"] == 2
    assert {name.split(".")[0] for name in aggregators(settings)} == {"OUT01"}


def test_sdxl_trains_with_sizes_and_dropped_captions(images, tmp_path):
    for seed in range(2):
        sdxl_pipeline(seed).save_pretrained(tmp_path / f"xl{seed}")
    small = {"hidden": 8, "heads": 2, "depth": 1, "resolution": 32, "batch_size": 2, "held_out": 2, "steps": 2, "evaluate_every": 1}
    experts = [str(tmp_path / "xl0"), str(tmp_path / "xl1")]
    record = train(TrainSettings(experts=experts, data=str(images), output=str(tmp_path / "out"), caption_dropout=0.5, device="cpu", **small))
    assert len(record["history"]) == 3 and all(np.isfinite(entry["held_out_loss"]) for entry in record["history"])


def test_two_processes_train_one_ensemble(settings, monkeypatch):
    """Real processes, real gradient exchange: both must end with the same aggregators, saved once."""
    kept, init = [], Trainer.__init__

    def remember(self, *args):
        init(self, *args)
        kept.append(self)

    settings = replace(settings, steps=2)

    def work():
        train(settings)
        return [float(p.double().abs().sum()) for p in kept[0].optimiser.param_groups[0]["params"]]

    monkeypatch.setattr(Trainer, "__init__", remember)
    one, other = in_processes(work)
    assert one == other
    assert Ensemble.load(settings.output).training["steps"] == 2


def test_dry_run_leaves_nothing_behind(settings):
    facts = plan(replace(settings, dry_run=True)).facts()
    assert facts["training_images"] == 8 and facts["held_out_images"] == 2 and facts["fused_stages"] == 5
    assert not Path(settings.output).exists()


# --- data ---------------------------------------------------------------------------------------------------------


def test_unusable_images_are_left_out_and_counted(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "silent.png")
    entries = [("good.png", "a square"), ("silent.png", "  "), ("gone.png", "c")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, "text": text}) for name, text in entries))
    found = open_source(str(tmp_path))
    assert [sample.caption for sample in found.samples] == ["a square"]
    assert found.skipped.names == {"no caption": ["silent.png"], "no such file": ["gone.png"]}
    assert "1 left out: no caption (silent.png)" in found.summary()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has no metadata.jsonl"),
        ("", "no image to train on"),
        ("{", "line 1 is not JSON"),
        ('{"text": "a"}', 'line 1 has no "file_name"'),
        ('{"file_name": "gone.png", "text": "a"}', "no image to train on: 0 captioned images; 1 left out: no such file"),
    ],
)
def test_a_folder_without_data_is_one_sentence(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=sentence):
        open_source(str(tmp_path))


def test_held_out_images_are_never_trained_on(images):
    training, held_out = split(open_source(str(images)).samples, 64, seed=3)
    assert len(held_out) == 2 and len(training) == 8 and not {s.name for s in training} & {s.name for s in held_out}


def test_every_epoch_uses_every_image_once(settings):
    trainer = object.__new__(Trainer)
    trainer.settings, trainer.asked = replace(settings, batch_size=3, accumulate=1), 0
    trainer.progress = type("Progress", (), {"step": 0})()
    trainer.processes = 1
    chosen = []
    for step in range(8):  # 24 places: three epochs of eight
        trainer.progress.step = step
        chosen += trainer._choose(Encoded(torch.empty(8, 0), ["a"] * 8, torch.full((8, 6), 32.0)))
    epochs = [chosen[:8], chosen[8:16], chosen[16:]]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and epochs[0] != epochs[1]


def test_images_are_cropped_to_their_centre_and_sizes_say_so(images):
    vae = sd_pipeline().vae
    encoded = encode([(open_source(str(images)).samples[-1], [Crop(32)])], vae, 4, Skipped())
    assert encoded.moments.shape == (1, 8, 4, 4)
    assert encoded.sizes.tolist() == [[49, 48, 0, 0, 32, 32]] or encoded.sizes.tolist() == [[49, 48, 0.0, 0.0, 32, 32]]


# --- conditions ------------------------------------------------------------------------------------


def test_captions_are_dropped_sample_by_sample(experts):
    ensemble = Ensemble.from_experts(experts)
    conditions = Conditions(ensemble.pipeline(), ensemble.denoiser, torch.device("cpu"))
    both = conditions(["a cat", "a dog"], torch.zeros(2, 6), torch.tensor([True, False]))["encoder_hidden_states"]
    kept = conditions(["a cat", "a dog"], torch.zeros(2, 6), torch.tensor([False, False]))["encoder_hidden_states"]
    empty = conditions(["", ""], torch.zeros(2, 6), torch.tensor([False, False]))["encoder_hidden_states"]
    assert torch.equal(both[0], empty[0]) and torch.equal(both[1], kept[1]) and not torch.equal(kept[0], empty[0])




def test_a_full_disk_at_the_end_loses_nothing(settings, monkeypatch):
    """Saving the ensemble fails; the same command then only saves."""
    settings, steps = replace(settings, steps=2), []
    original = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self: steps.append(1) or original(self))

    def full(self, *args, **options):
        raise OSError(28, "No space left on device", "out")

    with monkeypatch.context() as patch:
        patch.setattr(Ensemble, "save", full)
        with pytest.raises(OSError, match="No space"):
            train(settings)
    assert len(steps) == 2
    assert train(settings)["steps"] == 2 and len(steps) == 2
