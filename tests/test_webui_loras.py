"""LoRAs that prompts name on the page, from the folder of --lora-dir."""

import json
import socket
import urllib.request

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from webui_engine import ASKED, PROMPT, pixels

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'afa[ui]'")
from diffusers import StableDiffusionPipeline
from gradio_client import Client
from gradio_client.exceptions import AppError
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny_transformers import flux_pipeline

from afa.cli.main import main
from afa.demo.data import ENSEMBLE, EXPERTS
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.images import read_metadata
from afa.webui.engine import Engine
from afa.webui.serve import serving
from afa.webui.sessions import Sessions, request_from_metadata
from afa.webui.settings import UiSettings

STYLED = f"{PROMPT} <lora:style:0.8>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One LoRA that fits the demo's experts, and one that does not."""
    folder = tmp_path_factory.mktemp("loras")
    expert = Ensemble.load(ENSEMBLE).experts[0]
    torch.manual_seed(0)
    layers = {}
    for name, module, targets in (("unet", expert.model, ["to_q", "to_v"]), ("text_encoder", expert.text_encoders[0], ["q_proj", "v_proj"])):
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        for key, parameter in module.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
    StableDiffusionPipeline.save_lora_weights(folder, weight_name="style.safetensors", **layers)
    torn = load_file(folder / "style.safetensors")
    save_file({name: tensor[..., :-1].contiguous() for name, tensor in torn.items()}, folder / "torn.safetensors")
    return folder


def opened(place, folder, *sources):
    return Engine.open(UiSettings(output=str(place), device="cpu", lora_dir=str(folder)), list(sources) or [str(ENSEMBLE)])


@pytest.fixture(scope="module")
def engine(folder, tmp_path_factory):
    return opened(tmp_path_factory.mktemp("gallery"), folder)


def run(engine, **changes):
    job = engine.job(ASKED | {"prompt_syntax": "a1111"} | changes)
    engine.run(job)
    return job


def test_a_prompts_lora_draws_the_picture_of_afa_generate(engine, folder, tmp_path):
    job = run(engine, prompt=STYLED, methods=["afa", "expert:angles", "magicfusion"], seed=5)
    common = ["--prompt", STYLED, "--prompt-syntax", "a1111", "--lora-dir", str(folder), "--steps", "2", "--guidance", "3", "--seed", "5", "--device", "cpu"]
    several = [str(path) for path in EXPERTS.values()]
    for column, sources in zip(job.columns, ([str(ENSEMBLE)], [str(ENSEMBLE), "--expert", "angles"], [*several, "--method", "magicfusion"]), strict=True):
        assert column.error == ""
        assert main(["generate", *sources, *common, "--output", str(tmp_path / column.method[:3])]) == 0
        made = tmp_path / column.method[:3] / "00000-00.png"
        assert np.array_equal(np.asarray(Image.open(made)), pixels(column.pictures[0]))
        theirs, ours = read_metadata(made), read_metadata(column.pictures[0].path)
        assert {name: ours[name] for name in theirs if name != "source"} == {name: theirs[name] for name in theirs if name != "source"}
        assert "LoRA 'style'" in ours["files"] and ours["prompt"] == STYLED


def test_it_is_in_this_runs_pictures_only(engine):
    methods = ["afa", "single:curves"]
    before = [pixels(column.pictures[0]) for column in run(engine, methods=methods, seed=6).columns]
    with_it = [pixels(column.pictures[0]) for column in run(engine, prompt=STYLED, methods=methods, seed=6).columns]
    for path in engine.gallery.pictures()[0]:
        path.unlink()
    after = [pixels(column.pictures[0]) for column in run(engine, methods=methods, seed=6).columns]
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    assert not any(np.array_equal(*pair) for pair in zip(before, with_it, strict=True))
    for host in (engine.ensemble.denoiser, *engine.ensemble.text_encoders):
        assert not hasattr(host, "peft_config")


def test_it_comes_back_from_a_picture_and_with_other_strengths(engine):
    sessions = Sessions(engine)
    first = sessions.begin("tab", ASKED | {"prompt": STYLED, "prompt_syntax": "a1111", "seed": 7})
    engine.run(first)
    found, notes = request_from_metadata(first.columns[0].pictures[0].metadata, engine)
    assert notes == [] and found["prompt"] == STYLED
    second = sessions.again("tab", {"curves": 0.5})
    engine.run(second)
    assert "LoRA 'style'" in second.columns[0].pictures[0].metadata["files"]
    assert not np.array_equal(pixels(first.columns[0].pictures[0]), pixels(second.columns[0].pictures[0]))


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("a <lora:styl:1>", "did you mean 'style'"),
        ("a <lora:../style:1>", "there is no LoRA '../style'"),
        ("a <lora:style:many>", "is no number; write <lora:NAME:0.8>"),
        ("a <lora:style:1000>", "the strength in"),
        ("a <hypernet:style:1>", "names no LoRA"),
        ("a <lora:style:1> AND b", "composes two prompts"),
    ],
)
def test_what_is_not_there_is_a_sentence_before_the_run(engine, prompt, sentence):
    with pytest.raises(UserError, match="lora|LoRA|prompt") as error:
        engine.job(ASKED | {"prompt": prompt, "prompt_syntax": "a1111"})
    assert sentence in str(error.value)


def test_a_lora_that_does_not_fit_is_the_sentence_of_every_method_and_leaves_nothing(engine):
    job = run(engine, prompt="a <lora:style:1> <lora:torn:1>", methods=["afa", "expert:curves"])
    assert job.state == "done" and all("torn" in column.error and column.done and not column.pictures for column in job.columns)
    assert not hasattr(engine.ensemble.denoiser, "peft_config")
    assert len(run(engine, seed=8).columns[0].pictures) == 1


def test_without_a_folder_it_is_refused_as_by_afa_generate(tmp_path):
    engine = Engine.open(UiSettings(output=str(tmp_path), device="cpu"), [str(ENSEMBLE)])
    with pytest.raises(UserError, match=r"asks for the LoRA \"style\"; say where it is with --lora-dir FOLDER"):
        engine.job(ASKED | {"prompt": STYLED, "prompt_syntax": "a1111"})
    assert engine.loras == []


def test_a_folder_that_nothing_can_be_read_from_is_refused_at_the_start(folder, tmp_path):
    for place, sentence in ((tmp_path / "nowhere", "is no folder"), (tmp_path, "holds no LoRA")):
        with pytest.raises(UserError, match=sentence):
            opened(tmp_path / "gallery", place)
    flux_pipeline(0).save_pretrained(tmp_path / "flux")
    with pytest.raises(UserError, match="CLIP alone"):
        opened(tmp_path / "gallery", folder, str(tmp_path / "flux"))


def test_the_page_names_them_and_programs_use_them(folder, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(UiSettings(output=str(tmp_path), device="cpu", port=port, lora_dir=str(folder))) as served:
        config = json.loads(urllib.request.urlopen(f"{served.url}/config", timeout=20).read())
        assert any("&lt;lora:NAME:0.8&gt; takes a LoRA: style, torn." in str(part["props"].get("value")) for part in config["components"])
        client = Client(served.url, verbose=False, analytics_enabled=False)
        assert client.predict(api_name="/methods")["loras"] == ["style", "torn"]
        asked = {**ASKED, "prompt": STYLED, "prompt_syntax": "a1111"}
        assert "LoRA 'style'" in client.predict(**asked, api_name="/generate")[0]["settings"]["files"]
        assert "LoRA 'torn'" not in str(client.predict(**asked, api_name="/generate")[0]["settings"])
        with pytest.raises(AppError, match="did you mean 'style'"):
            client.predict(**asked | {"prompt": "a <lora:styl:1>"}, api_name="/generate")
