"""The web page's work without a page: methods from the same noise, cancelling, strengths, weights."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_transformers import flux_pipeline
from webui_engine import ASKED, PROMPT, open_engine, pixels, run

from afa.cli.main import main
from afa.demo.data import ENSEMBLE, EXPERTS
from afa.denoiser.hooks import scale_weights
from afa.errors import UserError
from afa.images import read_metadata
from afa.webui import markup
from afa.webui.gallery import RecordedWeights, WeightMapCache
from afa.webui.queue import follow
from afa.webui.sessions import Sessions, request_from_metadata


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return open_engine(tmp_path_factory.mktemp("gallery"))


def test_every_method_of_the_table_that_needs_no_base_is_offered_and_draws(engine):
    job = run(engine, methods=list(engine.methods), steps=1)
    assert len(job.columns) == 1 + 3 + 8 + 3
    assert list(engine.refused) == ["LoRAtorio"] and "needs the model that the experts were tuned from" in engine.refused["LoRAtorio"]
    assert [column.error for column in job.columns] == [""] * len(job.columns)
    assert all(len(column.pictures) == 1 and column.seconds > 0 for column in job.columns)


def test_pictures_are_those_of_afa_generate(engine, tmp_path):
    common = ["--prompt", PROMPT, "--steps", "2", "--guidance", "3", "--seed", "5", "--device", "cpu"]
    job = run(engine, methods=["afa", "expert:angles", "magicfusion"], seed=5)
    for column, more in zip(job.columns, ([], ["--expert", "angles"], None), strict=True):
        if more is None:
            more, sources = ["--method", "magicfusion"], [str(path) for path in EXPERTS.values()]
        else:
            sources = [str(ENSEMBLE)]
        assert main(["generate", *sources, *common, *more, "--output", str(tmp_path / column.method[:3])]) == 0
        made = tmp_path / column.method[:3] / "00000-00.png"
        assert np.array_equal(np.asarray(Image.open(made)), pixels(column.pictures[0]))
        theirs, ours = read_metadata(made), read_metadata(column.pictures[0].path)
        assert {name: ours[name] for name in theirs if name != "source"} == {name: theirs[name] for name in theirs if name != "source"}


def test_all_methods_begin_with_the_same_noise(engine):
    """After no step worth the name, what is left of the noise is the same; another seed has another."""
    job = run(engine, methods=["expert:curves", "single:curves"], images=2)
    first, second = job.columns
    assert [picture.seed for picture in first.pictures] == [0, 1]
    assert np.array_equal(pixels(first.pictures[0]), pixels(second.pictures[0]))  # the same model in the same frame
    assert not np.array_equal(pixels(first.pictures[0]), pixels(first.pictures[1]))


def test_a_cancelled_run_leaves_everything_usable(engine):
    before = run(engine, seed=9)
    job = engine.job(ASKED | {"methods": list(engine.methods), "steps": 50, "seed": 9, "scheduler": "euler"})
    scheduler = engine.ensemble.frame.scheduler
    seen = 0
    for _ in follow(engine.run, job):
        seen = max(seen, job.at[0])
        if job.at[0] >= 1:
            job.cancel()
    assert job.state == "cancelled" and 1 <= seen < 50 and job.columns[0].pictures == []
    assert engine.ensemble.frame.scheduler is scheduler
    before.columns[0].pictures[0].path.unlink()
    after = run(engine, seed=9)
    assert after.state == "done" and after.columns[0].pictures[0].path.exists() and not after.columns[0].pictures[0].kept


def test_whoever_stops_listening_stops_the_run(engine):
    job = engine.job(ASKED | {"steps": 90, "seed": 10})
    listening = follow(engine.run, job)
    next(listening)
    listening.close()
    assert job.state == "cancelled"


def test_the_same_picture_is_made_once_and_nothing_is_overwritten(engine):
    first, again, other = run(engine, seed=20), run(engine, seed=20), run(engine, seed=20, steps=3)
    assert not first.columns[0].pictures[0].kept and again.columns[0].pictures[0].kept
    assert again.columns[0].pictures[0].path == first.columns[0].pictures[0].path != other.columns[0].pictures[0].path


def test_a_strength_of_nought_takes_an_expert_out(engine):
    job = run(engine, strengths={"curves": 0}, seed=30)
    kept = engine.shelf.get(job.columns[0].pictures[0].path.name)
    weights = kept.look(0, "")
    assert weights.shape == (3, 64, 64) and weights[0].max() == 0
    assert np.allclose(weights.sum(0), 1, atol=2e-3)
    assert not np.array_equal(pixels(job.columns[0].pictures[0]), pixels(run(engine, seed=30).columns[0].pictures[0]))


def test_strengths_of_one_change_not_a_bit(engine):
    pipeline = engine.methods["afa"].make().pipeline

    def drawn():
        return pipeline(PROMPT, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images

    with scale_weights(engine.ensemble.denoiser, dict.fromkeys(engine.ensemble.names, 1.0)):
        scaled = drawn()
    assert np.array_equal(scaled, drawn())


def test_a_strength_moved_meanwhile_works_and_is_noted(engine):
    job = engine.job(ASKED | {"steps": 6, "seed": 31})
    on_step = job.on_step

    def moved(done, steps):
        if done == 3:
            job.strengths.update({"patterns": 0.0})
        on_step(done, steps)

    job.on_step = moved
    engine.run(job)
    picture = job.columns[0].pictures[0]
    assert read_metadata(picture.path)["strength_changes"] == [[3, {"curves": 1.0, "angles": 1.0, "patterns": 0.0}]]
    kept = engine.shelf.get(picture.path.name)
    assert kept.look(3, "")[2].mean() > 0.1 and kept.look(4, "")[2].max() == 0
    assert "after step 3: curves 1, angles 1, patterns 0<" in markup.settings(picture.metadata, picture.path.name)
    assert "strengths were changed while it was made" in request_from_metadata(picture.metadata, engine)[1][0]


def test_a_method_that_cannot_costs_only_itself(engine):
    job = run(engine, methods=["afa", "magicfusion", "superdiff_or"], guidance=1, scheduler="euler", seed=50)
    afa, magic, superdiff = job.columns
    assert afa.error == "" and len(afa.pictures) == 1
    assert "guidance 1 adds nothing" in magic.error and "makes its steps itself" in superdiff.error


def test_what_nobody_foresaw_costs_only_one_method_and_is_not_shown(engine, monkeypatch, capsys):
    def broken():
        raise RuntimeError("a secret path")

    monkeypatch.setitem(engine.methods, "afa", dataclasses.replace(engine.methods["afa"], make=broken))
    job = run(engine, methods=["afa", "expert:curves"], seed=51)
    assert "RuntimeError" in job.columns[0].error and "secret" not in job.columns[0].error
    assert "a secret path" in capsys.readouterr().err
    assert len(job.columns[1].pictures) == 1


def test_experts_without_aggregators_are_combined_while_sampling(tmp_path):
    sources = [str(EXPERTS["curves"]), f"other={EXPERTS['angles']}"]
    engine = open_engine(tmp_path, *sources)
    assert "afa" not in engine.methods and "expert:other" in engine.methods
    job = run(engine, methods=["noise_average"], steps=1)
    assert job.columns[0].error == "" and read_metadata(job.columns[0].pictures[0].path)["source"] == ["demo:curves", "other=demo:angles"]


def test_weights_are_looked_at_by_step_and_stage(engine):
    job = run(engine, steps=3, seed=70)
    kept = engine.shelf.get(job.columns[0].pictures[0].path.name)
    assert len(kept.timesteps) == 3 and list(kept.maps) == [stage.name for stage in engine.ensemble.denoiser.stages]
    assert np.allclose(np.mean([kept.look(step, "M00") for step in (1, 2, 3)], axis=0), kept.look(0, "M00"), atol=2e-3)
    assert "step 2 of 3" in markup.weights(kept, 2, "M00") and "stage M00" in markup.weights(kept, 2, "M00")
    with pytest.raises(UserError, match="no weights at stage 'M01'"):
        kept.look(0, "M01")
    with pytest.raises(UserError, match="has 3 steps, and step 4 is asked for"):
        kept.look(4, "")
    with pytest.raises(UserError, match=r"there are no weight maps of \.\./x"):
        engine.shelf.get("../x")


def test_methods_that_do_not_go_with_a_family_are_left_out_with_the_reason(tmp_path):
    for seed in range(2):
        flux_pipeline(seed).save_pretrained(tmp_path / f"flux-{seed}")
    engine = open_engine(tmp_path / "gallery", *(str(tmp_path / f"flux-{seed}") for seed in range(2)))
    assert "magicfusion" not in engine.methods and "have theirs built in" in engine.refused["MagicFusion"]
    assert engine.schedulers == ["euler", "dpm++", "unipc"] and engine.has_true_guidance
    job = run(engine, methods=["noise_average", "feature_mean"], width=32, height=32, true_guidance=2, negative_prompt="a cross")
    assert [column.error for column in job.columns] == ["", ""] and job.previews >= 2 and job.preview.shape == (4, 4, 3)


def test_the_oldest_weights_make_room():
    def kept():
        return RecordedWeights(np.zeros((8, 8, 3), np.uint8), ("a",), (1.0,), {"M00": np.zeros((1, 1, 8, 8), np.float16)})

    shelf = WeightMapCache(room=kept().size * 2)
    for name in "abc":
        shelf.put(name, kept())
    assert "a" not in shelf and "b" in shelf and "c" in shelf


def test_another_strength_draws_the_last_run_again(engine):
    sessions = Sessions(engine)
    first = sessions.begin("tab", ASKED | {"methods": ["afa", "expert:curves"], "seed": 80})
    assert sessions.again("tab", {"curves": 0.5}) is None  # it has not been made yet
    engine.run(first)
    assert sessions.again("tab", {}) is None and sessions.again("other tab", {"curves": 0.5}) is None
    second = sessions.again("tab", {"curves": 0.5})
    engine.run(second)
    assert [column.pictures[0].kept for column in second.columns] == [False, True]
    with pytest.raises(UserError, match="no run of yours"):
        sessions.cancel("tab")


def test_a_visitor_stops_only_what_is_theirs(engine):
    sessions = Sessions(engine)
    mine, yours = sessions.begin("me", ASKED), sessions.begin("you", ASKED)
    sessions.cancel("you")
    assert yours.stopped.is_set() and not mine.stopped.is_set()
    sessions.begin("me", ASKED)
    assert mine.stopped.is_set()
