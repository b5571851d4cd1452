"""Levels of speed: the cheapest ways within a margin, found in a fixed order, kept in the ensemble's folder."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from test_shared_guidance import ensemble as made

from afa import UserError
from afa.checkpoint.manifest import AGGREGATORS
from afa.generation import calibrate as module
from afa.generation.calibrate import Bench, Knobs, calibrate, possible_ways, table, words
from afa.generation.calibrate_settings import CalibrateSettings
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.generation.speed import SPEED, read_speed

PROMPTS = [f"a {colour} cat" for colour in ("red", "blue", "green", "black", "white", "grey", "brown")]
FIELDS = [field.name for field in dataclasses.fields(CalibrateSettings)]
ANY = "import numpy as np\ndef score(images, captions):\n    return {'any': np.zeros(len(images))}\n"  # all ways are alike
BRIGHT = "def score(images, captions):\n    return {'bright': images.mean((1, 2, 3))}\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "ensemble"
    made("sd", "stitch").save(folder, bundle=True)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "ensemble")


@pytest.fixture(scope="module")
def done(saved, tmp_path_factory):
    """The folder of an ensemble after a calibration in which all ways score alike, and its levels; only to be read."""
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("done") / "ensemble")
    return folder, calibrate(settings(folder))


@pytest.fixture
def calibrated(done, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(done[0], tmp_path / "ensemble")


def settings(folder, scorer=ANY, **changes):
    (folder.parent / "scorer.py").write_text(scorer)
    given = {"prompt": PROMPTS, "images": 7, "steps": 4, "guidance": 3.0, "width": 32, "height": 32, "batch_size": 7}
    return CalibrateSettings(str(folder), scorer=str(folder.parent / "scorer.py"), **{**given, **changes})


def generated(folder, output, **changes):
    given = {"prompt": PROMPTS[:1], "guidance": 3.0, "width": 32, "height": 32}
    (path,) = generate(GenerateSettings([str(folder)], output=str(output), **{**given, **changes}))
    with Image.open(path) as image:
        return np.asarray(image), json.loads(image.text["afa"])


def test_where_the_score_never_falls_the_cheapest_way_of_every_knob_is_taken(done):
    folder, speed = done
    assert speed.levels["exact"] == {"steps": 4}
    assert speed.levels["balanced"] == speed.levels["fast"] == {"steps": 2, "guidance_interval": module.GUIDED[-1]} | {
        key: value for key, value in speed.levels["fast"].items() if key in ("reuse", "lead")
    }
    prices = [speed.of(speed.levels[level])["price"] for level in ("exact", "balanced", "fast")]
    assert prices[0] > prices[1] == prices[2] and read_speed(folder / SPEED) == speed
    assert not (folder / module.PART).exists()


def test_what_lowers_the_score_is_not_taken(folder):
    """A scorer to which every picture but those of the exact ensemble is a little worse."""
    scorer = """
import numpy as np
first = {}
def score(images, captions):
    return {"same": np.array([-1e-3 * np.abs(image - first.setdefault(caption, image.astype(float))).mean() for image, caption in zip(images, captions)])}
"""
    speed = calibrate(settings(folder, scorer, margin=1e-9))
    assert len(speed.tried) > 2 and all(found["difference"][0] < 0 for found in speed.tried[1:])
    assert set(map(words, speed.levels.values())) == {"--steps 4"}


def test_the_margin_is_a_tenth_of_a_standard_deviation_where_none_is_given(folder):
    speed = calibrate(settings(folder, BRIGHT))
    scores = speed.of({"steps": 4})["scores"]
    assert speed.margins["balanced"] == pytest.approx(0.1 * np.std(scores, ddof=1))
    assert speed.margins["fast"] == pytest.approx(3 * speed.margins["balanced"])


def test_one_that_was_interrupted_draws_only_what_is_missing(done, folder, monkeypatch):
    expected, drawn, own = done[1], [], Bench._drawn

    def counted(self, way):
        drawn.append(words(way))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return own(self, way)

    monkeypatch.setattr(Bench, "_drawn", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(settings(folder))
    assert not (folder / SPEED).exists()
    found = calibrate(settings(folder))
    assert found.levels == expected.levels and len(drawn) == len(expected.tried) + 1  # the third one twice


def test_other_prompts_begin_anew_and_keep_the_levels_until_they_are_done(done, calibrated, monkeypatch):

    def never(self, way):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Bench, "_drawn", never)
        calibrate(settings(calibrated, prompt=[f"{prompt}, asleep" for prompt in PROMPTS]))
    assert read_speed(calibrated / SPEED) == done[1]


def test_a_level_draws_what_its_options_draw(done, tmp_path, capsys):
    folder, speed = done
    image, facts = generated(folder, tmp_path / "level", speed="fast")
    other, same = generated(folder, tmp_path / "options", **speed.levels["fast"])
    assert np.array_equal(image, other) and facts == same
    assert "was not measured" not in capsys.readouterr().err
    exact, _ = generated(folder, tmp_path / "exact", speed="exact")
    assert np.array_equal(exact, generated(folder, tmp_path / "four", steps=4)[0]) and not np.array_equal(exact, image)
    generated(folder, tmp_path / "strong", speed="fast", guidance=5.0)
    assert "--guidance 3.0" in capsys.readouterr().err


def test_the_table_names_every_level_and_the_command_that_uses_it(done):
    folder, speed = done
    text = table(speed, settings(folder))
    assert all(word in text for word in ("exact", "balanced", "fast", "--steps 2", "margins", "afa generate"))


def test_a_dry_run_lists_ways_by_knob_each_cheaper_than_the_exact_one(folder):
    ways = possible_ways(settings(folder))
    prices = [price for _, price in ways]
    assert ways[0][0] == "--steps 4" and max(prices[1:]) < prices[0] and len({way for way, _ in ways}) == len(ways)
    assert any("--lead" in way for way, _ in ways) and any("--guidance-interval" in way for way, _ in ways)


def test_prices_count_what_runs_and_what_changes_its_batch_runs_whole():
    denoiser = made("sd", "stitch").denoiser
    prices = module.Prices(denoiser, 8)
    each = prices.all / prices.one
    assert prices.of(4) == pytest.approx(4 * each)
    assert prices.of(4, guidance=(0.0, 0.5)) == pytest.approx(3 * each)
    lead = module.Reuse(4, lead=denoiser.names[0])
    assert prices.of(4, lead) == pytest.approx(each + 1 + 3)
    assert prices.of(4, lead, (0.0, 0.5)) == pytest.approx((each + 1 + 1) * 1.5)  # the half batch begins with a whole step


def test_without_guidance_there_is_none_to_leave_out(folder):
    asked = settings(folder, guidance=1.0)
    assert not any("--guidance-interval" in way for way, _ in possible_ways(asked))
    assert not any("guidance_interval" in found["way"] for found in calibrate(asked).tried)


def test_families_without_skips_let_an_expert_lead(tmp_path):
    made("sd3", "sabw").save(tmp_path / "sd3", bundle=True)
    ways = [way for way, _ in possible_ways(settings(tmp_path / "sd3"))]
    assert any("--lead" in way for way in ways) and not any("--reuse" in way and "--lead" not in way for way in ways)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt": PROMPTS[:2]}, "2 prompts are too few"),
        ({"images": 3}, "3 prompts are too few"),
        ({"lead": "nobody"}, "nobody"),
        ({"scorer": None, "metric": "frechet"}, "frechet"),
        ({"scheduler": "magic"}, "magic"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_anything_is_drawn(folder, changes, named):
    asked = settings(folder)
    given = {name: getattr(asked, name) for name in FIELDS}
    with pytest.raises(UserError, match=named):
        calibrate(CalibrateSettings(**{**given, **changes}))
    assert {path.name for path in folder.iterdir()} == {path.name for path in folder.iterdir()} - {SPEED, module.PART}


@pytest.mark.parametrize(("place", "named"), [("demo:ensemble", "part of afa"), ("demo:curves", "part of afa")])
def test_models_of_the_package_are_not_changed(place, named, tmp_path):
    asked = settings(tmp_path / "none")
    given = {name: getattr(asked, name) for name in FIELDS}
    with pytest.raises(UserError, match=named):
        calibrate(CalibrateSettings(**{**given, "ensemble": place}))


def test_levels_of_other_aggregators_are_refused_and_so_are_broken_files(saved, calibrated, tmp_path):
    with pytest.raises(UserError, match="no levels of speed"):
        generated(saved, tmp_path / "out", speed="fast")
    whole = json.loads((calibrated / SPEED).read_text())
    way = {"steps": 2}
    for changes, named in (
        ({"levels": {"fast": {**way, "lead": "../nobody"}}}, "nobody"),
        ({"levels": {"fast": {**way, "reuse": 0}}}, "reuse"),
        ({"levels": {"fast": {**way, "guidance_interval": "0;1"}}}, "guidance_interval"),
        ({"levels": {"balanced": way}}, "fast"),
        ({"aggregators": "0" * 64}, "other aggregators"),
    ):
        (calibrated / SPEED).write_text(json.dumps({**whole, **changes}))
        with pytest.raises(UserError, match=named):
            generated(calibrated, tmp_path / "out", speed="fast")
    assert (calibrated / AGGREGATORS).exists()


def test_what_a_stranger_wrote_into_the_levels_reaches_no_terminal_as_it_is(calibrated, tmp_path, capsys):
    whole, escape = json.loads((calibrated / SPEED).read_text()), "\x1b[2J"
    (calibrated / SPEED).write_text(json.dumps({**whole, "settings": {"guidance": escape}}))
    generated(calibrated, tmp_path / "out", speed="exact")
    (calibrated / SPEED).write_text(json.dumps({**whole, "levels": {escape: {"steps": 2}}}))
    with pytest.raises(UserError) as other:
        generated(calibrated, tmp_path / "out", speed="fast")
    (calibrated / SPEED).write_text(json.dumps({**whole, "levels": {"fast": {"steps": 2, "reuse": 2, "lead": escape}}}))
    with pytest.raises(UserError) as lead:
        generated(calibrated, tmp_path / "out", speed="fast")
    said = capsys.readouterr().err
    assert "calibrated with" in said and not any("\x1b" in text for text in (said, str(other.value), str(lead.value)))


@pytest.mark.parametrize(
    "changes",
    [{"steps": 4}, {"reuse": 2}, {"lead": "a", "reuse": 2}, {"guidance_interval": "0,0.5"}, {"expert": "a"}, {"method": "magicfusion"}],
)
def test_a_level_and_what_it_decides_are_not_given_together(folder, tmp_path, changes):
    with pytest.raises(UserError, match="--speed fast"):
        GenerateSettings([str(folder)], output=str(tmp_path), prompt=PROMPTS[:1], speed="fast", **changes)


def test_every_ladder_becomes_cheaper_step_by_step():
    for name in ("sd", "sd3"):
        ensemble = made(name, "stitch")
        knobs = Knobs(CalibrateSettings("x", prompt=PROMPTS, steps=20, guidance=3.0, width=32, height=32), ensemble)
        start = {"steps": 20}
        for ladder in (knobs.fewer(start), *knobs.reusing(start), knobs.guided_in_part(start)):
            prices = [knobs.price(way) for way in (start, *ladder)]
            assert all(after < before for before, after in itertools.pairwise(prices)), ladder


def test_an_interval_is_widened_for_the_number_of_ways(folder):
    bench = Bench(settings(folder, steps=20), folder, module.image_metric("attributes", None, str(folder.parent / "scorer.py"), None, 4))
    found = {"difference": [0.0, -1.96, 1.96]}
    assert bench.most_ways > 8 and -3.5 < bench.least(found) < -2.5  # 2.8 standard errors for ten ways
