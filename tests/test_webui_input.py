"""What reaches the web page from outside: orders, settings of pictures, files, reports; each confined, or refused by a sentence."""

import json

import numpy as np
import pytest
from made_results import write_results
from PIL import Image, PngImagePlugin
from webui_engine import ASKED, HARMFUL, PROMPT, open_engine, pixels, run

from afa.cli.main import main
from afa.errors import UserError
from afa.images import read_metadata, save_picture
from afa.webui import markup
from afa.webui.gallery import Gallery
from afa.webui.markup import read_reports
from afa.webui.sessions import request_from_metadata


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return open_engine(tmp_path_factory.mktemp("gallery"))


def test_settings_come_back_from_a_picture(engine):
    asked = {"methods": ["magicfusion"], "seed": 41, "steps": 3, "guidance": 2.5, "negative_prompt": "a cross", "scheduler": "ddim", "width": 32, "height": 48}
    job = run(engine, **asked)
    picture = job.columns[0].pictures[0]
    assert pixels(picture).shape == (48, 32, 3)
    found, notes = request_from_metadata(read_metadata(picture.path), engine)
    assert notes == [] and found | asked | {"prompt": PROMPT} == found
    again = engine.job({name: value for name, value in found.items() if value is not None})
    engine.run(again)
    assert again.columns[0].pictures[0].path == picture.path and again.columns[0].pictures[0].kept


def test_settings_that_cannot_be_had_here_are_said(engine):
    how = {"method": "loratorio", "method_options": {"patch": 2}, "expert": None}
    said = {"prompt": "a", "seed": 1, "steps": 5, **how, "scheduler": "Strange", "experts": ["x"]}
    found, notes = request_from_metadata(said, engine)
    assert found["methods"] == ["afa"] and len(notes) == 3
    with pytest.raises(UserError, match="the picture's settings cannot be used here: steps 5000 is out of bounds"):
        request_from_metadata(said | {"steps": 5000}, engine)
    with pytest.raises(UserError, match="the prompt must be text, not int"):
        request_from_metadata(said | {"prompt": 7}, engine)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "  "}, "there is no prompt"),
        ({"prompt": ["a"]}, "the prompt must be text, not list"),
        ({"prompt": "a" * 5000}, "5,000 characters; give at most 4,000"),
        ({"methods": []}, "no method is chosen"),
        ({"methods": ["magicfuson"]}, "did you mean 'magicfusion'"),
        ({"steps": 101}, "steps 101 is out of bounds; give a number from 1 to 100"),
        ({"steps": 2.5}, "steps must be a whole number from 1 to 100, not 2.5"),
        ({"steps": "many"}, "steps must be a number from 1 to 100, not 'many'"),
        ({"steps": None}, "steps must be a whole number from 1 to 100, not empty"),
        ({"images": 5}, "images 5 is out of bounds; give a number from 1 to 4"),
        ({"seed": -2}, "seed -2 is out of bounds"),
        ({"seed": True}, "seed must be a number"),
        ({"guidance": float("nan")}, "guidance must be a number"),
        ({"guidance": 1, "negative_prompt": "a"}, "guidance 1 turns guidance off, so a negative prompt changes nothing"),
        ({"true_guidance": 3}, "true guidance 3 is for models whose own guidance is built in"),
        ({"width": 4096}, "width 4096 is out of bounds; give a number from 4 to 128"),
        ({"height": 62}, "height 62 must be a multiple of 4 pixels"),
        ({"scheduler": "eulr"}, "did you mean 'euler'"),
        ({"strengths": {"curve": 1}}, "did you mean 'curves'"),
        ({"strengths": {"curves": 9}}, "the strength of curves 9 is out of bounds"),
        ({"strengths": {"curves": 0, "angles": 0, "patterns": 0}}, "all experts (curves, angles, patterns) are turned off"),
        ({"strengths": [1, 2]}, "strengths must be numbers by expert's name"),
    ],
)
def test_what_may_not_be_asked_for_is_a_sentence(engine, changes, sentence):
    with pytest.raises(UserError) as error:
        engine.job(ASKED | changes)
    assert sentence in str(error.value)


def test_the_gallery_finds_its_own_pictures_only(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    gallery = Gallery.at(tmp_path / "pictures")
    (gallery.folder / "link.png").symlink_to(tmp_path / "secret.png")
    save_picture(gallery.folder / "own.png", np.zeros((8, 8, 3), np.uint8), {"prompt": "a"})
    assert gallery.find("own.png").name == "own.png" and [path.name for path in gallery.pictures()[0]] == ["own.png"]
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "", ".", "other.png"):
        with pytest.raises(UserError, match="there is no picture"):
            gallery.find(name)
    with pytest.raises(UserError, match="is a file; give a folder"):
        Gallery.at(tmp_path / "secret.png")


def test_names_of_pictures_are_made_of_nothing_harmful(tmp_path):
    path = Gallery.at(tmp_path).path("expert:a", {"prompt": "../../etc/<script>", "seed": 1})
    assert path.parent == tmp_path.resolve() and path.name.startswith("etc-script-expert-a-1-")


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\nbroken", "foreign", "other"])
def test_a_picture_that_does_not_say_how_it_was_made_is_a_sentence(tmp_path, content):
    file = tmp_path / "a.png"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        chunk = PngImagePlugin.PngInfo()
        chunk.add_text("afa" if content == "other" else "parameters", "[1, 2]")
        Image.new("RGB", (8, 8)).save(file, pnginfo=chunk)
    with pytest.raises(UserError, match=r"a\.png (cannot be read as a PNG picture|does not say how it was made)"):
        read_metadata(file)


def test_prompts_are_shown_escaped(engine):
    job = run(engine, prompt=HARMFUL, seed=60, strengths={"curves": 0.5})
    job.columns[0].error = HARMFUL
    picture = job.columns[0].pictures[0]
    for shown in (markup.results(job), markup.settings(picture.metadata | {HARMFUL: HARMFUL}, HARMFUL), markup.status(job), markup.note(HARMFUL)):
        assert "<img src=x" not in shown and 'onerror="' not in shown
    assert markup.escape(HARMFUL) in markup.settings(picture.metadata, "a")


def test_reports_are_read_once_and_run_nothing(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "same").mkdir(parents=True)
        (tmp_path / name / "same" / "report.html").write_text('<p>"hello"</p><script>alert(1)</script>')
    reports = read_reports([str(tmp_path / name / "same") for name in ("one", "two")])
    assert [report.name for report in reports] == ["same 1", "same 2"]
    assert 'sandbox=""' in reports[0].frame and "<script>" not in reports[0].frame
    with pytest.raises(UserError, match=r"holds no report: it is neither an \.html file nor a folder"):
        read_reports([str(tmp_path)])


def test_an_evaluation_is_shown_as_afa_report_makes_it(tmp_path):
    write_results(tmp_path)
    assert "<table" in read_reports([str(tmp_path)])[0].html


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "there is no folder or file nowhere"),
        (["--queue", "0"], "--queue 0 is too small"),
        (["--port", "99999"], "--port 99999 is too large; the most is 65535"),
        (["--reports", "nowhere"], "--reports nowhere holds no report"),
        (["--host", "203.0.113.7"], "--host 203.0.113.7 cannot be used"),
        (["--experts", "a"], "--experts a names no expert"),
    ],
)
def test_bad_starts_are_one_sentence(arguments, sentence, tmp_path, capsys):
    assert main(["ui", *arguments, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert sentence in said.err.splitlines()[-1] and said.out == ""


def test_metadata_is_plain_json(engine):
    picture = run(engine, seed=90).columns[0].pictures[0]
    assert json.loads(json.dumps(picture.metadata)) == {name: value for name, value in read_metadata(picture.path).items() if name != "afa"}
