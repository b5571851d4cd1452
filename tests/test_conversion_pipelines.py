"""Experts of different kinds of prediction in stock pipelines: drawn, refused where features would be fused, trained, saved and loaded."""

import functools
import json
import shutil

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from rival_experts import CAT, DOG, SAMPLING, UNET, differ
from tiny import quiet, sd_pipeline

from afa import Ensemble, UserError, only_expert
from afa.checkpoint.manifest import read_manifest
from afa.denoiser.schedule import kind_of
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.sampling.registry import make_sampler
from afa.sampling.sample import sample
from afa.schedulers import make_scheduler, reschedule
from afa.training.run import train
from afa.training.settings import TrainSettings


def mixed(**options):
    """An expert that predicts noise, and one that predicts v, with one text encoder."""
    pipes = [sd_pipeline(seed, text_seed=0, prediction_type=kind, **UNET) for seed, kind in enumerate(("epsilon", "v_prediction"))]
    pipes[1].vae = pipes[0].vae
    return pipes, Ensemble.from_experts(pipes, **{"aggregator": "mean", "placement": "out", **options})


@functools.cache
def shared():
    """Those that tests only draw with."""
    return mixed()


@functools.cache
def own(index):
    """What one of them draws by itself."""
    return sample(quiet(shared()[0][index]), [CAT, DOG], SAMPLING)


class TestPictures:
    def test_a_converted_expert_alone_draws_its_own(self):
        _, ensemble = shared()
        for index in range(2):
            with only_expert(ensemble.denoiser, f"expert_{index}"):
                assert differ(sample(quiet(ensemble.pipeline()), [CAT, DOG], SAMPLING), own(index)) <= index

    def test_without_conversion_it_would_not(self):
        _, ensemble = mixed()
        ensemble.denoiser.conversions = (None, None)
        with only_expert(ensemble.denoiser, "expert_1"):
            assert differ(sample(quiet(ensemble.pipeline()), [CAT], SAMPLING), own(1)[:1]) > 10

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("single_in_ensemble", {"expert": "expert_1"}),
            ("random_expert", {"weights": [0, 1], "frame": "ensemble"}),
            ("noise_average", {"weights": [0, 1]}),
            ("timestep_experts", {"table": "1000-0:expert_1"}),
            ("magicfusion", {"general": "expert_1", "mode": 1, "t0": 0}),
        ],
    )
    def test_a_rival_of_one_converted_expert_is_that_expert(self, method, options):
        assert differ(make_sampler(method, shared()[1], **options)([CAT, DOG], SAMPLING), own(1)) <= 1

    def test_whose_kind_the_frame_has_hardly_matters(self):
        """DDIM makes the same step of a noise, a v or a flow that say the same."""
        images = [make_sampler("noise_average", made)([CAT], SAMPLING) for made in (shared()[1], mixed(scheduler="expert_1")[1])]
        assert differ(*images) <= 1

    def test_an_expert_of_a_flow_joins_one_of_a_diffusion_schedule(self):
        pipes, ensemble = with_a_flow()
        assert ensemble.denoiser.conversions[1].own.kind == "flow"
        flow, both, noise = (make_sampler("noise_average", ensemble, weights=weights)([CAT], SAMPLING) for weights in ([0, 1], [1, 1], [1, 0]))
        assert np.array_equal(noise, sample(quiet(pipes[0]), [CAT], SAMPLING)) and min(differ(flow, both), differ(both, noise)) > 1


def with_a_flow():
    """An expert that predicts noise on a diffusion schedule, and one of a flow."""
    pipes, _ = mixed()
    pipes[1].scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    return pipes, Ensemble.from_experts(pipes, "mean", "out")


class TestRefusals:
    def test_a_placement_with_features(self):
        for placement in ("layers", None, ["M00", "OUT03"]):
            with pytest.raises(UserError, match=r"'expert_1' cannot join 'expert_0': prediction_type is v_prediction, expected epsilon .*placement out"):
                mixed(placement=placement)

    def test_features_of_experts_that_share_a_router(self):
        _, ensemble = mixed()
        with pytest.raises(UserError, match="prediction_type is v_prediction"):
            ensemble.sharing("mean", "layers")
        with pytest.raises(UserError, match="prediction_type is v_prediction"):
            make_sampler("feature_mean", ensemble)

    def test_a_scheduler_for_other_predictions_than_they_are_converted_to(self):
        pipes, ensemble = mixed()
        with pytest.raises(UserError, match="models that predict v_prediction, and the experts' predictions are made epsilon, .*scheduler="):
            ensemble.pipeline(scheduler=pipes[1].scheduler)
        assert ensemble.pipeline(scheduler=make_scheduler("euler", pipes[0].scheduler)) is not None

    def test_a_scheduler_by_name_that_is_not_for_all_of_them(self):
        _, ensemble = with_a_flow()
        reschedule(ensemble, "unipc")
        assert [kind_of(expert.scheduler) for expert in ensemble.experts] == ["epsilon", "flow"]
        with pytest.raises(UserError, match="expert 'expert_1': scheduler 'ddim' is for models with a diffusion schedule"):
            reschedule(ensemble, "ddim")

    def test_inpainting(self):
        pipes = [sd_pipeline(seed, prediction_type=kind, in_channels=9, **UNET) for seed, kind in enumerate(("epsilon", "v_prediction"))]
        with pytest.raises(UserError, match="9 channels in and 4 out"):
            Ensemble.from_experts(pipes, "mean", "out")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two experts of different kinds and six captioned images, on disk."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, pipe in zip(("noise", "v"), mixed()[0], strict=True):
        pipe.save_pretrained(folder / name)
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "data" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def recipe(world, output, **changes):
    small = {"hidden": 8, "heads": 2, "depth": 1, "resolution": 32, "batch_size": 2, "held_out": 2, "steps": 2, "lr": 1e-2, "device": "cpu"}
    experts = [str(world / "noise"), str(world / "v")]
    return TrainSettings(experts=experts, data=str(world / "data"), output=str(output), **{"placement": "out", **small, **changes})


class TestOnDisk:
    def test_a_router_is_trained_saved_and_loaded_again(self, world, tmp_path):
        train(recipe(world, tmp_path / "router"))
        assert [entry.prediction_type for entry in read_manifest(tmp_path / "router").experts] == ["epsilon", "v_prediction"]
        loaded = Ensemble.load(tmp_path / "router")
        assert [found and found.own.kind for found in loaded.denoiser.conversions] == [None, "v_prediction"]
        images = sample(quiet(loaded.pipeline()), [CAT], SAMPLING)
        loaded.save(tmp_path / "bundle", bundle=True)
        assert np.array_equal(sample(quiet(Ensemble.load(tmp_path / "bundle").pipeline()), [CAT], SAMPLING), images)
        with pytest.raises(UserError, match="prediction_type is v_prediction, expected epsilon"):
            train(recipe(world, tmp_path / "layers", placement="layers"))

    def test_an_expert_that_predicts_something_else_by_now_is_noticed(self, world, tmp_path):
        for name in ("noise", "v"):
            shutil.copytree(world / name, tmp_path / name)
        Ensemble.from_experts([str(tmp_path / "noise"), str(tmp_path / "v")], "mean", "out").save(tmp_path / "both")
        shutil.copy(world / "noise" / "scheduler" / "scheduler_config.json", tmp_path / "v" / "scheduler" / "scheduler_config.json")
        with pytest.raises(UserError, match="expert 'v' has changed: its scheduler says prediction_type epsilon, the ensemble was made with v_prediction"):
            Ensemble.load(tmp_path / "both")

    def test_generate_combines_their_predictions_and_no_features(self, world, tmp_path):
        experts = [str(world / "noise"), str(world / "v")]
        asked = {"prompt": ["a cat"], "steps": 2, "guidance": 3.0, "width": 32, "height": 32, "device": "cpu"}
        generate(GenerateSettings(sources=experts, output=str(tmp_path / "out"), method="noise_average", **asked))
        with pytest.raises(UserError, match="prediction_type is v_prediction, expected epsilon"):
            generate(GenerateSettings(sources=experts, output=str(tmp_path / "out"), method="feature_mean", **asked))
