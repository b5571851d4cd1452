"""What the page adds to a run: options of methods, regions, the time that is left, previews; and bad numbers in every field."""

import dataclasses
import json
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from webui_engine import ASKED, open_engine, pixels, run

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'afa[ui]'")
from afa.errors import UserError
from afa.images import read_metadata
from afa.latents import latents_of
from afa.sampling.regions import mask_of
from afa.webui import markup
from afa.webui.controls import OPTION, add_region, filled_options, given_options
from afa.webui.preview import colour_map, preview, previewed
from afa.webui.serve import serving
from afa.webui.sessions import request_from_metadata
from afa.webui.settings import UiSettings

LEFT = mask_of(np.repeat(np.uint8([[255] * 4 + [0] * 4]), 8, axis=0))
REGION = {"expert": "curves", "strength": 0, "end": 0.5, "mask": LEFT}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return open_engine(tmp_path_factory.mktemp("gallery"))


def test_a_region_takes_an_expert_out_where_it_is_painted_and_comes_back_from_the_picture(engine):
    picture = run(engine, regions=[REGION]).columns[0].pictures[0]
    kept = engine.shelf.get(picture.path.name)
    assert kept.look(1, "M00")[0, :, :24].max() == 0 and kept.look(1, "M00")[0, :, 40:].min() > 0
    assert kept.look(2, "M00")[0].min() > 0  # the second half of the steps
    found, notes = request_from_metadata(read_metadata(picture.path), engine)
    assert notes == [] and engine.job({name: value for name, value in found.items() if value is not None}).request.regions[0].mask == LEFT
    plain = run(engine).columns[0].pictures[0]
    assert plain.metadata["regions"] is None and not np.array_equal(pixels(plain), pixels(picture))
    assert "painted" in markup.settings(picture.metadata, "a.png")


def test_options_of_a_method_are_those_of_the_registry_and_come_back(engine):
    asked = {"methods": ["magicfusion"], "method_options": {"magicfusion": {"mode": 2, "t0": "500", "general": "angles"}}}
    picture = run(engine, **asked).columns[0].pictures[0]
    recorded = picture.metadata["method_options"]
    assert (recorded["mode"], recorded["t0"], recorded["general"], recorded["k_expert"]) == (2, 500.0, "angles", 1.0)
    found, notes = request_from_metadata(read_metadata(picture.path), engine)
    assert notes == [] and found["method_options"] == {"magicfusion": {"mode": 2, "t0": 500.0, "general": "angles"}}
    filled = filled_options(engine, found["method_options"])
    again = engine.job(ASKED | {"methods": ["magicfusion"], "method_options": given_options(filled, ["magicfusion"])})
    engine.run(again)
    assert again.columns[0].pictures[0].kept


def test_every_option_of_every_method_is_in_the_form(engine):
    expected = {f"{OPTION}{method.name}:{field.name}" for method in engine.methods.values() if method.options for field in dataclasses.fields(method.options)}
    assert set(filled_options(engine, {})) == expected and len(expected) >= 15
    usual = engine.job(ASKED | {"methods": list(engine.methods), "method_options": given_options(filled_options(engine, {}), list(engine.methods))})
    for name, options in usual.request.method_options.items():
        assert dataclasses.asdict(options) == engine.methods[name].record["method_options"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ["magicfusion"], "method_options": {"magicfusion": {"mode": 3}}}, "magicfusion: mode 3 is too large; the most is 2"),
        ({"methods": ["magicfusion"], "method_options": {"magicfusion": {"mode": "two"}}}, "magicfusion: mode=two is not a whole number"),
        ({"methods": ["magicfusion"], "method_options": {"magicfusion": {"t1": 1}}}, "t0"),
        ({"method_options": {"magicfusion": {"mode": 2}}}, "options of magicfusion are given, which is not chosen"),
        ({"method_options": {"afa": {"mode": 2}}}, "options of afa are given, which has no options"),
        ({"method_options": [1]}, "method options must be options by method"),
        ({"method_options": {"magicfusion": 1}}, "method options must be options by method"),
        ({"regions": [REGION | {"expert": "curve"}]}, "did you mean 'curves'"),
        ({"regions": "curves"}, "regions must be a list, not str"),
        ({"regions": [REGION] * 101}, "101 regions are given; give at most 100"),
        ({"regions": [REGION | {"start": 0.1, "end": 0.2}]}, "where none of 2 steps begins"),
        ({"regions": [REGION], "methods": ["expert:curves"]}, "regions act in AFA or Feature mean (untrained), which is not chosen"),
        ({"regions": [{"expert": name, "strength": 0} for name in ("curves", "angles", "patterns")]}, "all experts are off"),
    ],
)
def test_what_may_not_be_asked_for_is_a_sentence(engine, changes, sentence):
    with pytest.raises(UserError) as error:
        engine.job(ASKED | changes)
    assert sentence in str(error.value)


def test_a_strength_and_a_region_that_turn_everyone_off_cost_only_this_method(engine):
    off = [{"expert": name, "strength": 0, "mask": LEFT} for name in ("angles", "patterns")]
    job = run(engine, methods=["afa", "expert:curves"], strengths={"curves": 0}, regions=off)
    assert "all experts are off at a place of the picture" in job.columns[0].error and len(job.columns[1].pictures) == 1


def test_regions_are_added_as_they_are_painted(engine):
    names = engine.ensemble.names
    regions = add_region(names, [], "curves", 0.5, 0, 1, json.dumps(LEFT))
    assert regions == [{"expert": "curves", "strength": 0.5, "start": 0.0, "end": 1.0, "mask": LEFT}]
    assert add_region(names, regions, "angles", 2, 0.5, 1, "")[1]["mask"] is None
    for mask in ("{", "[1]", json.dumps({"size": [2, 2], "counts": [9]}), "1" * 200_001):
        with pytest.raises(UserError):
            add_region(names, [], "curves", 0.5, 0, 1, mask)


def test_previews_show_the_picture_to_come_and_change_not_a_bit(engine, monkeypatch):
    """The last preview of a run is near to the picture; DDIM and Euler hold latents in different units."""
    monkeypatch.setattr("afa.webui.preview.EVERY", 0.0)
    for scheduler in ("ddim", "euler", "dpm++"):
        plain = engine.methods["expert:curves"]
        job = run(engine, methods=["expert:curves"], steps=4, seed=3, scheduler=scheduler)
        assert job.previews == 4 and job.preview.dtype == np.uint8
        made = pixels(job.columns[0].pictures[0]).astype(float)
        unit = made.shape[0] // job.preview.shape[0]
        small = made.reshape(job.preview.shape[0], unit, job.preview.shape[1], unit, 3).mean((1, 3))
        assert np.corrcoef(small.ravel(), job.preview.astype(float).ravel())[0, 1] > 0.6, scheduler
        job.columns[0].pictures[0].path.unlink()
        monkeypatch.setattr("afa.webui.engine.previewed", lambda *_: __import__("contextlib").nullcontext())
        again = run(engine, methods=["expert:curves"], steps=4, seed=3, scheduler=scheduler)
        drawn = again.columns[0].pictures[0]
        assert again.previews == 0 and np.array_equal(pixels(drawn), made.astype(np.uint8)) and plain.made(drawn.metadata)
        monkeypatch.setattr("afa.webui.engine.previewed", previewed)


def test_colours_of_latents_are_fitted_to_the_frames_own_vae(engine):
    """A red picture's latents are shown red, a green one's green, a blue one's blue."""
    vae = engine.ensemble.frame.vae
    colours, latents = colour_map(vae), latents_of(vae)
    assert colours is colour_map(vae) and colours.shape == (latents.channels + 1, 3)
    for channel in range(3):
        flat = torch.full((1, 3, 64, 64), -0.5)
        flat[:, channel] = 0.7
        with torch.no_grad():
            scaled = latents.scaled(latents.moments(vae, flat)[:, : latents.channels])[0]
        shown = preview(scaled, colours)
        assert shown.mean((0, 1)).argmax() == channel and shown.shape == (*scaled.shape[1:], 3)


def test_the_time_that_is_left_is_that_of_the_steps_that_are_left(engine, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("afa.webui.queue.time.monotonic", lambda: now[0])
    job = engine.job(ASKED | {"methods": ["afa", "expert:curves"], "images": 2, "steps": 10})
    assert job.seconds_left is None
    job.state = "running"
    for done in (1, 2, 3):
        now[0] += 2.0
        job.on_step(done, 10)
    assert job.seconds_left == 2.0 * (7 + 10 + 20) and "step 3 of 10, picture 1 of 2 (method 1 of 2), about 74 s left" in markup.status(job)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(UiSettings(output=str(tmp_path_factory.mktemp("page")), device="cpu", port=port)) as served:
        yield served.url


def test_bad_values_in_any_field_leave_no_traceback_in_the_terminal(url, capfd):
    """Of every event of the page, with every field in turn: the answer is an error, or the value was one."""
    config = json.loads(urllib.request.urlopen(f"{url}/config", timeout=20).read())
    parts = {part["id"]: part for part in config["components"]}
    tried = 0
    for event in config["dependencies"]:
        inputs = [parts[index] for index in event["inputs"]]
        numbers = [place for place, part in enumerate(inputs) if part["type"] in ("slider", "number", "textbox", "dropdown")]
        if event["api_name"] in ("generate", "draw", "draw_1") or not event["backend_fn"] or not numbers:
            continue
        for place in numbers:
            for bad in ("abc", -5, 1e9, 2.5, {"a": 1}, [1], True, "9" * 5000):
                data = [part["props"].get("value") for part in inputs]
                data[place] = bad
                body = json.dumps({"data": data, "fn_index": event["id"], "session_hash": "x"}).encode()
                request = urllib.request.Request(f"{url}/gradio_api/run/predict", body, {"Content-Type": "application/json"})
                try:
                    urllib.request.urlopen(request, timeout=20).read()
                except urllib.error.HTTPError as error:
                    answered = json.loads(error.read())
                    assert (answered.get("error") or answered.get("detail")), (event["api_name"], place, bad)
                tried += 1
    said = capfd.readouterr()
    assert tried > 100 and "Traceback" not in said.err + said.out
