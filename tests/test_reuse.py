"""What is reused between steps: which stages and experts run, and when an image begins."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from family_models import MODELS, sample_of
from PIL import Image
from tiny import ONE_LEVEL, inputs, quiet, sd_pipeline, sd_unet, sdxl_pipeline
from tiny import SMALL as NINE_STAGES

from afa import Ensemble, UserError
from afa.aggregators.registry import Recipe
from afa.denoiser.hooks import only_expert, record_weights
from afa.denoiser.reuse import Reuse
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.models.unet import UNetEnsemble
from afa.training.run import plan
from afa.training.settings import TrainSettings

SMALL = {"hidden": 8, "heads": 2, "depth": 1}


@pytest.fixture
def ensemble():
    torch.manual_seed(0)
    made = UNetEnsemble([sd_unet(seed, **NINE_STAGES) for seed in range(2)], ["a", "b"], Recipe("stitch", SMALL)).eval()
    for aggregator in made.aggregators.values():
        torch.nn.init.normal_(aggregator.conv_out.weight)
    return made


def ran(denoiser, timestep, call, **changes):
    """Return the names of the first expert's stages that ran, and the prediction."""
    names = []
    hooks = [
        stage.modules()[0].register_forward_hook(lambda *_, name=stage.name: names.append(name))
        for stage in denoiser.stages
    ]
    with torch.no_grad():
        prediction = denoiser(**{**call, "timestep": timestep, **changes}).sample
    for hook in hooks:
        hook.remove()
    return len(set(names)), prediction


def test_inner_stages_run_in_every_third_step_and_what_they_hand_on_is_used_again(ensemble):
    call, whole = inputs(), len(ensemble.stages)
    exact = [ran(ensemble, 900 - step, call)[1] for step in range(4)]
    ensemble.reuse = Reuse(3, 2)
    found = [ran(ensemble, 900 - step, call) for step in range(4)]
    assert [count for count, _ in found] == [whole, 4, 4, whole]
    assert torch.equal(found[0][1], exact[0]) and torch.equal(found[3][1], exact[3])
    assert 0 < (found[1][1] - exact[1]).abs().max() < 0.1 * exact[1].abs().max()  # one step of a thousand
    again = ran(ensemble, 900, call)[1]  # the noise rises: another image, begun with all stages
    assert torch.equal(again, exact[0])


def test_with_the_same_latents_and_timestep_nothing_changes(ensemble):
    call = inputs()
    ensemble.reuse = Reuse(2, 3)
    (first, exact), (then, reused) = ran(ensemble, 500, call), ran(ensemble, 500, call)
    assert (first, then) == (len(ensemble.stages), 6) and torch.equal(exact, reused)


def test_another_prompt_batch_or_expert_begins_another_image(ensemble):
    call, whole = inputs(), len(ensemble.stages)
    ensemble.reuse = Reuse(5, 1)
    other = call["encoder_hidden_states"].clone()
    assert [ran(ensemble, 500 - step, call)[0] for step in range(2)] == [whole, 2]
    assert ran(ensemble, 400, call, encoder_hidden_states=other)[0] == whole
    assert ran(ensemble, 399, call, encoder_hidden_states=other)[0] == 2
    other.mul_(2)  # in place
    assert ran(ensemble, 398, call, encoder_hidden_states=other)[0] == whole
    assert ran(ensemble, 300, inputs(batch=1))[0] == whole
    with only_expert(ensemble, "b"):
        assert ran(ensemble, 200, call)[0] == 0  # the first expert does not run
    assert ran(ensemble, 199, call)[0] == whole


def test_gradients_are_those_of_all_stages(ensemble):
    call = inputs()
    exact = ensemble(**call).sample
    ensemble.reuse = Reuse(2)
    for _ in range(2):
        assert torch.equal(ensemble(**call).sample, exact)


@pytest.mark.parametrize("make", [sd_pipeline, sdxl_pipeline])
def test_a_pipeline_whose_experts_have_text_encoders_of_their_own_reuses_features(make):
    ensemble = Ensemble.from_experts([make(seed) for seed in range(2)], **SMALL)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "width": 32, "height": 32, "output_type": "np"}
    calls = []

    def drawn():
        calls.clear()
        hook = ensemble.denoiser.experts[1].mid_block.register_forward_hook(lambda *_: calls.append(1))
        images = quiet(ensemble.pipeline())("a cat", generator=torch.Generator().manual_seed(0), **options).images
        hook.remove()
        return images

    exact = drawn()
    assert len(calls) == 4
    ensemble.denoiser.reuse = Reuse(2)
    reused = [drawn() for _ in range(2)]
    assert len(calls) == 2 and np.array_equal(*reused) and 0 < np.abs(exact - reused[0]).max() < 0.3


@pytest.mark.parametrize("family", MODELS)
def test_between_whole_steps_one_expert_leads_and_what_the_others_added_is_added_again(family):
    model = MODELS[family]
    ensemble = model.ensemble([model.make(seed) for seed in range(2)], ["a", "b"], Recipe("sabw", SMALL)).eval()
    call = model.call()
    name, to_model = ensemble.interface.timestep_input, ensemble.interface.timestep_to_model
    first, later = ({**call, name: torch.full_like(torch.as_tensor(call[name]), float(to_model(torch.tensor(time))))} for time in (750.0, 500.0))

    def predicted(arguments):
        with torch.no_grad():
            return sample_of(ensemble(**arguments))

    exact = [predicted(first), predicted(later)]
    with only_expert(ensemble, "b"):
        alone = [predicted(first), predicted(later)]
    ensemble.reuse = Reuse(2, lead="b")
    assert torch.equal(predicted(first), exact[0])
    reused = predicted(later)
    assert torch.allclose(reused, alone[1] + exact[0] - alone[0], atol=1e-5) and not torch.equal(reused, exact[1])
    assert torch.equal(predicted(later), exact[1])  # the next whole step
    with only_expert(ensemble, "b"):
        assert torch.equal(predicted(first), alone[0]) and torch.equal(predicted(later), alone[1])


@pytest.mark.parametrize(
    ("reuse", "sentence"),
    [
        (Reuse(0, 1), "every 0th step cannot be whole"),
        (Reuse(2, 0), "there are 1 to 4 outer stages, not 0"),
        (Reuse(2, 5), "there are 1 to 4 outer stages, not 5"),
        (Reuse(2, lead="c"), "'c'.*a, b"),
    ],
)
def test_what_does_not_fit_is_refused(ensemble, reuse, sentence):
    with pytest.raises(UserError, match=sentence):
        ensemble.reuse = reuse


def test_networks_without_skip_connections_are_refused():
    for family in ("sd3", "flux", "qwen-image"):
        model = MODELS[family]
        with pytest.raises(UserError, match="only in U-Nets.*let one expert lead"):
            model.ensemble([model.make(0)]).reuse = Reuse(2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved ensemble of two experts."""
    folder = tmp_path_factory.mktemp("reuse")
    experts = [str(folder / f"expert{seed}") for seed in range(2)]
    for seed, expert in enumerate(experts):
        sd_pipeline(seed, **ONE_LEVEL).save_pretrained(expert)
    Ensemble.from_experts(experts, **SMALL).save(folder / "ensemble")
    return str(folder / "ensemble")


@pytest.fixture
def settings(saved, tmp_path):
    small = {"steps": 4, "guidance": 3.0, "width": 32, "height": 32, "device": "cpu"}
    return GenerateSettings(sources=[saved], output=str(tmp_path / "out"), prompt=["a cat"], **small)


def test_the_command_reuses_features_and_the_picture_records_it(settings, tmp_path):
    pixels = []
    for name, reuse, outer in (("exact", 1, None), ("reused", 2, 1)):
        (path,) = generate(replace(settings, output=str(tmp_path / name), reuse=reuse, reuse_outer=outer))
        pixels.append(np.asarray(Image.open(path).convert("RGB")).astype(int))
        assert ('"reuse": {"every": 2, "outer": 1, "lead": null}' in Image.open(path).text["afa"]) == (reuse == 2)
    assert np.abs(pixels[0] - pixels[1]).max() > 0
    with pytest.raises(UserError, match="was made with reuse"):
        generate(replace(settings, output=str(tmp_path / "exact"), reuse=2))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reuse": 2, "method": "magicfusion"}, "--reuse 2 is for a whole ensemble, and --method magicfusion"),
        ({"reuse": 2, "expert": "expert0"}, "--reuse 2 is for a whole ensemble, and --expert expert0"),
        ({"reuse": 2, "weights": True}, "--weights needs the weights of all stages in all steps, and --reuse 2"),
        ({"reuse_outer": 3}, "--reuse-outer 3 is for --reuse"),
        ({"lead": "photo"}, "--lead photo is for --reuse"),
        ({"reuse": 2, "lead": "photo", "reuse_outer": 3}, "--reuse-outer 3 is for inner stages .* --lead photo leaves out experts"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(settings, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(settings, **changes)


def test_weights_are_not_recorded_and_nothing_is_trained_while_steps_are_reused(ensemble, tmp_path):
    ensemble.reuse = Reuse(2)
    with pytest.raises(RuntimeError, match="set denoiser.reuse = None"), record_weights(ensemble):
        pass
    whole = Ensemble.from_experts([sd_pipeline(seed, **ONE_LEVEL) for seed in range(2)], **SMALL)
    whole.denoiser.reuse = Reuse(2)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(['{"file_name": "a.png", "text": "a"}'] * 5))
    settings = TrainSettings(experts=["a", "b"], data=str(tmp_path), output=str(tmp_path / "out"), held_out=1)
    with pytest.raises(UserError, match=r"set ensemble.denoiser.reuse = None"):
        plan(settings, whole)


def test_another_image_at_the_same_timestep_is_begun_with_all_stages(ensemble):
    """As of two images of one step each, from the same prompt embeddings; what the first one kept is not the second one's."""
    call, whole = inputs(), len(ensemble.stages)
    noise = torch.randn_like(call["sample"])
    exact = ran(ensemble, 500, call, sample=noise)[1]
    ensemble.reuse = Reuse(2)
    assert ran(ensemble, 500, call)[0] == whole
    count, prediction = ran(ensemble, 500, call, sample=noise)
    assert count == whole and torch.equal(prediction, exact)
    noise.mul_(2)  # other noise in the same place
    assert ran(ensemble, 500, call, sample=noise)[0] == whole
