"""The command: what it leaves, what it keeps, what it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from explained import SMALL, asked, ensemble
from PIL import Image

from afa import Ensemble, UserError
from afa.cli.main import main
from afa.demo.data import ENSEMBLE, EXPERTS
from afa.explanation.causes import Unused
from afa.explanation.chart import chart
from afa.explanation.explanation import explain
from afa.explanation.pictures import frames, save_strip, sheet, words
from afa.explanation.recording import record
from afa.explanation.run import run
from afa.explanation.settings import ExplainSettings
from afa.explanation.shares import as_data, estimates
from afa.pictures import fitting, font, wrapped

PROMPTS = ["a red star", "red ring"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two images of the embedded world, explained."""
    folder = tmp_path_factory.mktemp("explain") / "out"
    settings = ExplainSettings(output=str(folder), ensemble=str(ENSEMBLE), prompt=PROMPTS, steps=2, guidance=3.0, word_steps=1, device="cpu")
    return settings, folder, run(settings)


def test_every_image_has_its_pictures_and_the_page_needs_nothing_else(made):
    _, folder, found = made
    for stem in ("00000", "00001"):
        for suffix in ("png", "sheet.png", "strip.webp", "words.png", "counterfactuals.png", "skipped.png", "json", "npz"):
            assert (folder / f"{stem}.{suffix}").exists(), suffix
    page = (folder / "explain.html").read_text()
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:|#)', page)
    assert all(prompt in page for prompt in PROMPTS)
    assert json.loads((folder / "explain.json").read_text()) == json.loads(json.dumps(found))
    assert not list(folder.glob(".writing-*"))


def test_numbers_have_n_and_an_interval(made):
    found = made[2]
    share = found["shares"]["weights"]["final"]["curves"][0]
    assert share["n"] == 2 and share["low"] <= share["value"] <= share["high"]
    words_ = {row["word"]: row for row in found["words"]}
    assert words_["red"]["omitted"]["n"] == 2 and words_["star"]["omitted"]["n"] == 1 and words_["star"]["omitted"]["low"] is None
    assert set(found["counterfactuals"]) > {"curves off", "equal weights", "left out where unused"}
    assert found["unused"]["counts"]["angles"] == sum(map(sum, found["unused"]["cells"]["angles"])) >= 2
    for name in ("afa", "torch", "diffusers"):
        assert found["versions"][name]


def test_arrays_hold_maps_and_attention(made):
    with np.load(made[1] / "00000.npz") as arrays:
        assert arrays["OUT03"].shape == (2, 3, 16, 16) and arrays["OUT03"].dtype == np.float16
        assert np.allclose(arrays["OUT03"].astype(float).sum(1), 1, atol=2e-3)
        assert arrays["attention.M00"].shape == (len(arrays["words"]), 8, 8) and list(arrays["words"])[:3] == ["a", "red", "star"]
        assert arrays["means"].shape == arrays["most"].shape == (2, 9, 3)


def test_only_what_is_missing_is_made_again(made):
    settings, folder, found = made
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("0000*")}
    (folder / "00001.sheet.png").unlink()
    again = run(settings)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("0000*")}
    assert again == found
    assert {name for name in before if after[name] != before[name] and name.startswith("00000")} == set()
    assert after["00001.sheet.png"] > before["00001.sheet.png"]


def test_a_folder_of_other_settings_is_refused(made):
    settings, folder, _ = made
    with pytest.raises(UserError, match=r"was begun with --steps 2 \(now 4\)"):
        run(replace(settings, steps=4))
    with pytest.raises(UserError, match="--prompt"):
        run(replace(settings, prompt=["another"]))
    with pytest.raises(UserError, match="holds other files"):
        (folder.parent / "other").mkdir()
        (folder.parent / "other" / "notes.txt").write_text("mine")
        run(replace(settings, output=str(folder.parent / "other")))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --prompt TEXT... or --prompts FILE"),
        ([str(EXPERTS["curves"]), "--prompt", "a"], "is no saved ensemble: it has no afa.json"),
        (["nowhere", "--prompt", "a"], "nowhere is no saved ensemble"),
        (["--prompt", "a", "--counterfactuals", "of"], "did you mean 'off'"),
        (["--prompt", "a", "--counterfactuals", "none", "off"], "asks for none and for some"),
        (["--prompt", "a", "--threshold", "2"], "--threshold 2 is too large"),
        (["--prompt", "a", "--word-steps", "-1"], "--word-steps -1 is too small"),
        (["--prompt", "a", "--steps", "0"], "--steps 0 is too small"),
        (["--prompt", "a", "--width", "30"], "--width 30 must be a multiple of 8"),
        (["--prompt", "a", "--scheduler", "eulr"], "did you mean 'euler'"),
        (["--prompt", "a", "--true-guidance", "3"], "true guidance 3 is for models whose own guidance is built in"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, sentence, tmp_path, capsys):
    assert main(["explain", *arguments, "--output", str(tmp_path / "out")]) == 2
    said_ = capsys.readouterr()
    assert sentence in said_.err.splitlines()[-1] and said_.err.splitlines()[-1].startswith("afa: ") and said_.out == ""
    assert not (tmp_path / "out").exists()


def test_one_expert_has_nothing_to_explain(tmp_path, capsys):
    Ensemble.from_experts([str(EXPERTS["curves"])], **SMALL).save(tmp_path / "one")
    assert main(["explain", str(tmp_path / "one"), "--prompt", "a", "--output", str(tmp_path / "out")]) == 2
    assert "has one expert, curves, and so no weights to explain" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_embedded_ensemble_is_explained_without_naming_it(tmp_path, capsys):
    command = ["explain", "--prompt", "a star", "--output", str(tmp_path / "out"), "--steps", "2", "--word-steps", "0", "--counterfactuals", "none"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["guidance"] == 3.0 and found["settings"]["steps"] == 2 and found["experts"] == ["curves", "angles", "patterns"]
    assert found["counterfactuals"] == {} and found["words"] == [] and found["images"][0]["words"][0]["looked"] > 0
    assert not (tmp_path / "out" / "00000.counterfactuals.png").exists()
    assert main(command) == 0
    assert "1 image explained" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_are_drawn_with_their_own_stages(family):
    found = explain(ensemble(family, seeds=(0, 1)), *asked(family), kinds=["equal"], word_steps=1)
    assert sheet(found.recording, "tiny").width > 600
    assert words(found.recording, found.causes) is not None
    assert found.shares.groups == (("J", "final") if family == "sd3" else found.shares.groups)


def test_pictures_fit_two_and_six_experts_with_long_names_and_many_stages():
    base = record(ensemble(), *asked(steps=2))
    for count in (2, 6):
        names = tuple(f"realistic-vision-v6.0-B1-noVAE-epoch-{index}" for index in range(count))
        maps = {stage: base.maps[stage][:, :1].repeat(1, count, 1, 1) * 0 + 1 / count for stage in base.maps}
        many = replace(base, experts=names, maps=maps)
        assert sheet(many, "facts").height > sheet(many, "facts").width / 4
        assert len({picture.size for picture in frames(many)}) == 1
        most = np.full((50, 25, count), 0.01, np.float32)
        drawn = chart(Unused(names, base.stages, most, np.ones(25)), most, list(range(50)), 3)
        assert 600 < drawn.width <= 1400


def test_the_strip_is_endless_and_small(tmp_path):
    found = record(ensemble(), *asked())
    save_strip(found, tmp_path / "strip.webp")
    with Image.open(tmp_path / "strip.webp") as strip:
        assert strip.n_frames == 3 and strip.info["loop"] == 0
    assert (tmp_path / "strip.webp").stat().st_size < 1_000_000


def test_words_on_pictures_fit():
    for words_ in ("a", "majicMIX-realistic-v7-fp16-pruned.safetensors", "x" * 300):
        assert font(14).getlength(fitting(words_, 14, 90)) <= 90
    assert len(wrapped("word " * 200, 14, 200, 2)) == 2


def test_a_single_image_has_no_interval():
    one, two = (estimates([np.full((1, 1, 1), value) for value in values])[0, 0, 0] for values in ((0.5,), (0.25, 0.75)))
    assert not one.has_interval and as_data(one) == {"value": 0.5, "low": None, "high": None, "n": 1}
    assert as_data(two) == {"value": 0.5, "low": 0.25, "high": 0.75, "n": 2} and as_data(None) is None


def test_the_help_names_every_counterfactual(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    said_ = capsys.readouterr().out
    assert all(name in said_ for name in ("off", "swapped", "pairs", "frozen", "equal", "skipped"))
    assert Path(ENSEMBLE).name == "ensemble"
