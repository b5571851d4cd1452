"""Text encoders and VAEs from files of their own, as ComfyUI's users have them: the same ensemble as that of the whole folder, to the bit."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import sd_pipeline, sdxl_pipeline
from tiny_chroma import chroma_pipeline
from tiny_flux2 import flux2_pipeline, klein_pipeline
from tiny_krea2 import krea2_pipeline
from tiny_lumina2 import lumina2_pipeline
from tiny_qwen_image_21 import qwen_image_21_pipeline
from tiny_transformers import flux_pipeline, qwen_image_pipeline, sd3_pipeline
from tiny_z_image import z_image_pipeline

from afa import Ensemble, UserError

PIPELINES = {
    "sd": sd_pipeline,
    "sdxl": sdxl_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
    "flux2": flux2_pipeline,
    "klein": klein_pipeline,
    "chroma": chroma_pipeline,
    "z-image": z_image_pipeline,
    "qwen-image": qwen_image_pipeline,
    "qwen-image-2.1": qwen_image_21_pipeline,
    "krea2": krea2_pipeline,
    "lumina2": lumina2_pipeline,
}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
WEIGHTS = (".safetensors", ".bin")


def save(tensors, path):
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def encoders_of(pipe):
    return {name: pipe.components[name] for name in ENCODERS if pipe.components.get(name) is not None}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Of a family, made once: its whole folder, a frame without weights, and each part's file."""
    made = {}

    def of(family):
        if family not in made:
            root, pipe = tmp_path_factory.mktemp(family), PIPELINES[family](0)
            pipe.save_pretrained(root / "whole")
            shutil.copytree(root / "whole", root / "frame", ignore=lambda _, names: [name for name in names if name.endswith(WEIGHTS)])
            denoiser = "unet" if "unet" in pipe.components else "transformer"
            files = {name: save(encoder.state_dict(), root / f"{name}.safetensors") for name, encoder in encoders_of(pipe).items()}
            files["vae"] = save(pipe.vae.state_dict(), root / "vae.safetensors")
            files["model"] = save(pipe.components[denoiser].state_dict(), root / "model.safetensors")
            if family == "lumina2":  # whose transformer is read from its folder only
                files["model"] = str(root / "whole" / denoiser)
            made[family] = root, pipe, files
        return made[family]

    return of


def texts(files):
    return [files[name] for name in reversed(ENCODERS) if name in files]  # in any order


def from_files(root, files, **changes):
    given = {"text_encoders": texts(files), "vae": files["vae"], "frame": str(root / "frame"), "config": str(root / "frame")}
    return Ensemble.from_experts([f"own={files['model']}"], aggregator="mean", placement="out", **{**given, **changes})


def draw(ensemble):
    pipe = ensemble.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt="a red bicycle", num_inference_steps=1, height=64, width=64, output_type="np", generator=torch.Generator().manual_seed(0)).images


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("family", PIPELINES)
def test_an_ensemble_of_separate_files_is_that_of_the_folder_to_the_bit(family, parts):
    root, _, files = parts(family)
    whole = Ensemble.from_experts([f"own={root / 'whole'}"], aggregator="mean", placement="out")
    separate = from_files(root, files)
    assert len(separate.text_encoders) == len(whole.text_encoders) > 0
    assert all(same(one, other) for one, other in zip(separate.text_encoders, whole.text_encoders, strict=True))
    assert same(separate.frame.vae, whole.frame.vae)
    assert (draw(separate) == draw(whole)).all()
