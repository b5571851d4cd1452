"""Laws of looking on: nothing changes by it, weights are convex, words are found where their tokens are."""

from functools import cache

import numpy as np
import pytest
import torch
from explained import MAKERS, PROMPT, asked, ensemble, pipeline
from tiny import SMALL, inputs, sd_unet
from tiny_transformers import flux_transformer, sd3_transformer

from afa.cost import call_of, count_flops, count_stage_flops
from afa.denoiser.hooks import hide_tokens, record_weights, watch_weights
from afa.explanation.attention import AREA, find_words, lean
from afa.explanation.causes import find_causes
from afa.explanation.explanation import UNREAD, explain, word_remarks, word_rows
from afa.explanation.recording import record
from afa.explanation.shares import FINAL, lead_at, overlay_at, shares, stage_groups, weights_at
from afa.models.unet import UNetEnsemble
from afa.sampling.sample import sample


@cache
def looked_on(family="sd"):
    """An image as it is before anything has looked on, what was recorded, and the pipeline."""
    made = ensemble(family)
    pipe, (request, sampling) = pipeline(made), asked(family)
    image = sample(pipe, [request], sampling)[0]
    return image, record(made, request, sampling, pipe), pipe


@pytest.mark.parametrize("family", MAKERS)
def test_looking_on_changes_nothing_and_weights_are_convex(family):
    made, (request, sampling) = ensemble(family), asked(family)
    expected, found, pipe = looked_on(family)
    assert np.array_equal(found.image, expected)
    assert len(found.timesteps) == len(found.calls) == 3 and found.stages == tuple(made.denoiser.fused)
    for maps in found.maps.values():
        assert maps.dtype == torch.float16 and maps.shape[:2] == (3, 2)
        assert torch.allclose(maps.float().sum(1), torch.ones(()), atol=2e-3)
    assert np.allclose(found.means.sum(-1), 1, atol=1e-3)
    assert (found.most >= found.means - 1e-3).all()  # over both halves of guidance
    assert "step" not in vars(pipe.scheduler)  # what was watched is as before
    assert np.array_equal(sample(pipe, [request], sampling)[0], expected)


def test_the_half_with_the_prompt_is_recorded():
    made, (request, sampling) = ensemble("sd"), asked()
    _, found, pipe = looked_on()
    with record_weights(made.denoiser) as maps:
        sample(pipe, [request], sampling)
    for stage in found.stages:
        assert torch.equal(found.maps[stage], maps.stage(stage)[:, -1].half())


@pytest.mark.parametrize("family", MAKERS)
def test_the_image_believed_in_at_the_last_step_is_nearly_the_image(family):
    made = ensemble(family)
    request, sampling = asked(family, steps=4)
    found = record(made, request, sampling)
    assert sorted(found.drawn) == list(range(4)) and found.drawn[3].shape == found.image.shape
    apart = [float(np.abs(found.drawn[index].astype(int) - found.image).mean()) for index in (0, 3)]
    assert apart[1] < apart[0] or apart[1] < 2


@pytest.mark.parametrize("family", MAKERS)
def test_words_are_found_where_their_tokens_are(family):
    made = ensemble(family)
    pipe = pipeline(made)
    words = find_words(pipe, PROMPT, 77 + 256 if family == "sd3" else 64)
    assert [word.text for word in words] == ["a", "red", "bicycle", "on", "a (2)", "lawn"]
    starts = {"flux": 0, "qwen-image": 0, "krea2": 0, "lumina2": 26}  # lumina2: after <bos> and the system prompt
    first = starts.get(family, 1)  # after CLIP's start of the text
    assert words[0].tokens[0] == first and words[1].tokens[0] == first + 1
    clip = [len(pipe.tokenizer(word, add_special_tokens=False).input_ids) for word in "a red bicycle on a lawn".split()]
    counts = {"flux": [1] * 6, "qwen-image": [1] * 6, "krea2": [1] * 6, "lumina2": [1] * 6, "sd3": [count + 1 for count in clip]}  # sd3: of CLIP and of T5
    assert [len(word.tokens) for word in words] == counts.get(family, clip)
    assert words[2].left_out(PROMPT) == "a red , on a lawn"


def test_a_word_past_the_end_has_no_tokens_and_is_named():
    made = ensemble()
    words = find_words(pipeline(made), "a cat " * 60, 77)
    assert words[0].tokens == (1,) and words[-1].tokens == ()
    request, sampling = asked(steps=1)
    found = record(made, type(request)("a cat " * 60, 0), sampling)
    assert "Not seen, as the text is cut before: " in " ".join(word_remarks(found))


def test_attention_is_a_share_of_looking_and_leans_cancel():
    found = looked_on()[1].attention
    assert set(found.maps) == set(ensemble("sd").denoiser.fused)
    assert all((maps >= 0).all() and (maps.sum(0) <= 1 + 1e-5).all() for maps in found.maps.values())
    assert 0 < found.looked.sum() < 1
    assert np.allclose(found.leans.sum(1), 0, atol=1e-5)


def test_attention_is_what_the_layer_computes():
    """Its mean over heads, times the values of one head, by the layer itself."""
    from afa.explanation.attention import probabilities

    layer = ensemble(heads=1).aggregators["M00"].transformer.transformer_blocks[0].attn2
    hidden, states = torch.randn(1, 6, 8), torch.randn(1, 5, 24)
    with torch.no_grad():
        expected = layer(hidden, encoder_hidden_states=states)
        found = layer.to_out[0](probabilities(layer, hidden, states, None)[None] @ layer.to_v(states))
    assert torch.allclose(found, expected, atol=1e-5)


def test_an_expert_leans_to_the_word_whose_area_it_has():
    looked = torch.zeros(2, 4 * AREA)
    looked[0, :4], looked[1] = 1.0, 0.3  # a word looked at from four places, one from everywhere alike
    weights = torch.stack([looked[0], 1 - looked[0]])
    assert torch.allclose(lean(looked, weights), torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def test_hiding_no_token_changes_nothing_and_hiding_all_is_refused():
    denoiser = UNetEnsemble([sd_unet(seed, **SMALL) for seed in range(2)])
    for part in denoiser.aggregators.values():
        torch.nn.init.normal_(part.conv_out.weight)

    def weights():
        seen = []
        with torch.no_grad(), watch_weights(denoiser, lambda _, maps: seen.append(maps)):
            denoiser(**inputs())
        return torch.cat([maps.flatten() for maps in seen])

    whole = weights()
    with hide_tokens(denoiser, []):
        assert torch.allclose(weights(), whole, atol=1e-5)
    with hide_tokens(denoiser, [0, 3]):
        assert not torch.allclose(weights(), whole, atol=1e-5)
    assert torch.equal(weights(), whole)
    with pytest.raises(ValueError, match="all 7 tokens are hidden"), hide_tokens(denoiser, range(7)):
        weights()


@pytest.mark.parametrize("family", MAKERS)
def test_what_words_pull_cancels_over_experts(family):
    _, found, pipe = looked_on(family)
    causes = find_causes(pipe, ensemble(family).denoiser, found, 2)
    for effects in (causes.hidden, causes.omitted):
        assert effects.moved.shape == (6,) and ((effects.moved > 0) & (effects.moved < 1)).all()
        assert np.allclose(effects.pull.sum(1), 0, atol=1e-5)
        assert (np.abs(effects.pull).sum(1) / 2 <= effects.moved + 1e-6).all()
    rows = word_rows(found, causes)
    assert [row.omitted for row in rows] == sorted((row.omitted for row in rows), reverse=True)


@pytest.mark.parametrize("options", [{"aggregator": "mean"}, {"depth": 0}, {"ignore": ("text",)}], ids=["mean", "depth 0", "text ignored"])
def test_aggregators_that_read_no_text_are_said_to(options):
    made = ensemble(**options)
    found = explain(made, *asked(), word_steps=1)
    assert found.recording.attention is None and word_remarks(found.recording) == [f"{UNREAD}."]
    assert found.causes.hidden is None and (found.causes.omitted.moved > 0).all() == ("aggregator" not in options)


def test_a_router_is_explained_at_its_only_stage():
    made = ensemble(placement="out")
    found = explain(made, *asked(), word_steps=1)
    assert found.recording.stages == ("OUT03",) and found.shares.groups == (FINAL,)


def test_shares_sum_to_one_and_stages_are_grouped():
    made = ensemble()
    found = shares(record(made, *asked(steps=8)), 1000)
    assert found.groups == ("IN", "M", "OUT", FINAL) and np.allclose(found.weights.sum(-1), 1, atol=1e-3)
    many = [f"J{index:02}" for index in range(24)]
    assert list(stage_groups([*many, "OUT"])) == ["J00-J11", "J12-J23", FINAL]
    assert list(stage_groups(["D00", "D04", "S02", "S06", "OUT"])) == ["D", "S", FINAL]


def test_maps_are_convex_at_any_step_and_stage():
    _, found, _ = looked_on()
    for passes, stages in ((None, None), (1, "M00"), ([0, 2], ["IN00", "OUT03"])):
        weights = weights_at(found, passes, stages)
        assert weights.shape == (2, 32, 32) and np.allclose(weights.sum(0), 1, atol=2e-3)
        assert overlay_at(found, passes, stages).shape == lead_at(found, passes, stages).shape == (32, 32, 3)


@pytest.mark.parametrize("make", [sd_unet, sd3_transformer, flux_transformer])
def test_stages_cost_what_the_model_costs_but_for_embeddings(make):
    model = make()
    with torch.device("meta"):
        outline = type(model).from_config(dict(model.config))
    total, parts = count_flops(outline, 16, 16).total, count_stage_flops(model, 16, 16)
    assert 0.98 * total < sum(parts.values()) <= total and all(parts.values())
    assert call_of(model, 16, 16, 1)


def test_public_names_are_what_they_say():
    import afa.explanation

    for name in afa.explanation.__all__:
        assert callable(getattr(afa.explanation, name)) and getattr(afa.explanation, name).__name__ == name
