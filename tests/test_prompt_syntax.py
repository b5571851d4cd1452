"""Prompts in A1111's syntax: what brackets mean, how chunks are made, and whose states are weighted."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ONE_LEVEL, quiet, sd_pipeline, sdxl_pipeline, tokenizer
from tiny_transformers import flux_pipeline, sd3_pipeline
from webui_engine import ASKED, open_engine, pixels, run

import afa
from afa import Ensemble, UserError, weighted_prompts
from afa.denoiser.base import split_joined
from afa.prompt_syntax import check_syntax, make_chunks, read_weights, split_loras
from afa.prompts import unread
from afa.sampling.sample import PipelineSampler, Request, Sampling, in_frame, sample
from afa.text_encoder import width_of
from afa.webui.sessions import request_from_metadata

PLAIN_WORDS = ["a cat", "a red house, a dog"]
SAMPLING = {"steps": 2, "guidance": 3.0, "width": 16, "height": 16}


def made(make, seed=0, **changes):
    """A pipeline whose text states have a mean, as trained ones do; weights of words keep it."""
    pipe = quiet(make(seed, **changes))
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        for name, parameter in encoder.named_parameters() if encoder is not None else ():
            if "layer_norm" in name and name.endswith("bias"):
                torch.nn.init.constant_(parameter, 0.3)
    return pipe


@pytest.fixture(scope="module")
def sd():
    return made(sd_pipeline, **ONE_LEVEL)


@pytest.fixture(scope="module")
def three():
    """Experts with text encoders of their own."""
    return Ensemble.from_experts([made(sd_pipeline, seed, **ONE_LEVEL) for seed in range(3)], aggregator="mean")


def pieces(prompt):
    return [("BREAK", None) if piece.weight is None else (piece.text, round(piece.weight, 6)) for piece in read_weights(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [  # the first seven are in the docstring of A1111's parser
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
        ),
        ("", [("", 1)]),
        ("a [dog]", [("a ", 1), ("dog", 0.909091)]),
        ("(a: 1.5 ) b", [("a", 1.5), (" b", 1)]),
        ("a:1.2) b)", [("a:1.2) b)", 1)]),
        ("(one BREAK two:2)", [("one", 2), ("BREAK", None), ("two", 2)]),
        ("breaks BREAK\nBREAKS", [("breaks", 1), ("BREAK", None), ("BREAKS", 1)]),
    ],
)
def test_brackets_mean_what_they_mean_in_a1111(prompt, expected):
    assert pieces(prompt) == expected


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_no_token_is_lost_and_a_chunk_ends_at_a_comma_that_is_near(pad):
    words = tokenizer(pad)
    text = "a, " + "a " * 68 + ", " + "a " * 150
    whole = words(text, add_special_tokens=False, verbose=False).input_ids
    chunks = make_chunks(read_weights(text), words)
    assert all(len(chunk.tokens) == len(chunk.weights) == 77 for chunk in chunks)
    assert [token for chunk in chunks for token in chunk.tokens[1 : chunk.read - 1]] == whole
    comma = words.get_vocab()[",</w>"]
    assert chunks[0].tokens[chunks[0].read - 2] == comma and chunks[0].read == 73 and chunks[1].read == 77
    (short,) = make_chunks(read_weights("a cat"), words)
    assert short.tokens == words("a cat", padding="max_length", max_length=77).input_ids
    assert len(make_chunks(read_weights("a BREAK b BREAK c"), words)) == 3


@pytest.mark.parametrize(("make", "zeros"), [(sd_pipeline, None), (sdxl_pipeline, True), (sdxl_pipeline, False)])
@pytest.mark.parametrize("negatives", [None, ["a dog", ""]])
def test_short_prompts_without_weights_are_the_stock_pipelines_bit_for_bit(make, zeros, negatives):
    pipe = quiet(make())
    if zeros is not None:
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    stock = pipe.encode_prompt(
        prompt=PLAIN_WORDS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negatives
    )
    found = weighted_prompts(pipe, PLAIN_WORDS, negatives)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, states in zip(names, stock, strict=False):
        assert torch.equal(found[name], states), name
    assert "negative_prompt_embeds" not in weighted_prompts(pipe, PLAIN_WORDS, negatives, guided=False)


def test_an_image_without_weights_is_the_same_in_both_syntaxes(three):
    pipe = in_frame(three, three.denoiser)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(PLAIN_WORDS)]
    plain, weighted = (sample(pipe, requests, Sampling(**SAMPLING, prompt_syntax=syntax)) for syntax in ("plain", "a1111"))
    assert np.array_equal(plain, weighted)
    other = sample(pipe, [Request("a (cat:1.9)", 0)], Sampling(**SAMPLING, prompt_syntax="a1111"))
    assert not np.array_equal(other[0], plain[0])


def test_one_expert_draws_what_its_own_pipeline_draws_of_the_same_embeddings(sd):
    prompt = "a (cat:1.5), [dog], " * 20
    alone = Ensemble.from_experts([sd], aggregator="mean")
    sampler = PipelineSampler(in_frame(alone, alone.denoiser))
    drawn = sampler([Request(prompt, 7)], Sampling(**SAMPLING, negative_prompt="a (house:0.5)", prompt_syntax="a1111"))
    embeds = weighted_prompts(sd, [prompt], ["a (house:0.5)"])
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 16, "height": 16, "output_type": "np"}
    expected = sd(**embeds, generator=[torch.Generator().manual_seed(7)], **options).images
    assert np.array_equal(drawn, (expected * 255).round().astype(np.uint8))


@pytest.mark.parametrize("make", [sd_pipeline, sdxl_pipeline])
def test_every_expert_gets_its_own_states_and_keeps_their_mean(make):
    pipes = [made(make, seed) for seed in range(2)]
    both = Ensemble.from_experts(pipes, aggregator="mean")
    prompt = "a (red:1.6) house, [a dog]"
    joined = weighted_prompts(both.pipeline(), [prompt])
    own = [weighted_prompts(pipe, [prompt]) for pipe in pipes]
    encoders = [pipe for pipe in (pipes[0].text_encoder, getattr(pipes[0], "text_encoder_2", None)) if pipe is not None]
    for name, states in joined.items():
        widths = [encoder.config.projection_dim for encoder in encoders[1:]] if "pooled" in name else list(map(width_of, encoders))
        for part, one in zip(split_joined(states, widths, 2, name), own, strict=True):
            assert torch.equal(part, one[name]), name
    plain = weighted_prompts(pipes[0], ["a red house, a dog"])["prompt_embeds"]
    if make is sd_pipeline:
        assert torch.allclose(own[0]["prompt_embeds"].mean(), plain.mean(), atol=1e-6)


def test_the_weights_are_a1111s_formula(sd):
    words = sd.tokenizer
    ids = torch.tensor([words("a red cat", padding="max_length", max_length=77).input_ids])
    states = sd.text_encoder(ids)[0]
    weights = torch.ones(77)
    red = words(" red", add_special_tokens=False).input_ids
    weights[2 : 2 + len(red)] = 1.5
    weighted = states * weights[None, :, None]
    expected = weighted * (states.mean() / weighted.mean())
    assert torch.equal(weighted_prompts(sd, ["a (red:1.5) cat"])["prompt_embeds"], expected)


def test_an_image_does_not_depend_on_longer_prompts_in_its_batch(three):
    pipe = in_frame(three, three.denoiser)
    how = Sampling(**SAMPLING, prompt_syntax="a1111")
    requests = [Request("a (cat:1.2)", 1), Request("a red house, " * 40, 2), Request("a dog", 3)]
    together = sample(pipe, requests, how)
    for request, image in zip(requests, together, strict=True):
        assert np.abs(sample(pipe, [request], how)[0].astype(int) - image).max() <= 1
    cut = sample(pipe, [Request("a red house, " * 40 + "ring", 2)], how)
    assert not np.array_equal(cut[0], together[1])  # all of it is read


@pytest.mark.parametrize("make", [sd3_pipeline, flux_pipeline])
def test_models_that_read_prompts_otherwise_are_refused(make):
    with pytest.raises(UserError, match="CLIP alone .*read as they are"):
        weighted_prompts(quiet(make()), ["a (cat:1.2)"])


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a [cat:dog:0.5]", "at a step"),
        ("a [cat:12]", "at a step"),
        ("a [cat|dog]", "at every step"),
        ("a cat AND a dog", "small letters"),
        ("a <lora:x:1>", "--lora-dir"),
        ("a <hypernet:x:1>", "names a file"),
        ("a (cat:1.2.3)", "weight \"1.2.3\" is no number"),
        ("a (cat:1000000)", "too large|most"),
    ],
)
def test_what_a1111_does_and_afa_does_not_is_refused_by_name(sd, prompt, told):
    for call in (lambda: check_syntax(["a", prompt]), lambda: weighted_prompts(sd, ["a", prompt])):
        with pytest.raises(UserError, match=f"prompt 2: .*({told})"):
            call()
    with pytest.raises(UserError, match="the negative prompt: .*name it in the prompt"):
        check_syntax(["a <lora:x:1>"], "negative prompt")
    check_syntax([r"a \[cat\|dog\] of sand and (stone:1.2)", "[words: with: colons]", "f(x) [1]"])


def test_a_lora_is_taken_out_of_its_prompt():
    text, (lora, other) = split_loras("a <lora:style:0.8> cat<LYCO:my style>")
    assert text == "a  cat" and (lora.name, lora.strength, other.name, other.strength) == ("style", 0.8, "my style", 1.0)
    for wrong in ("<lora:a:b>", "<lora:a:1:2>", "<lora::1>", "<lora:a:nan>", "<hypernet:a:1>"):
        with pytest.raises(UserError, match="the prompt: "):
            split_loras(f"a {wrong}")


def test_states_that_would_not_be_finite_are_refused(sd):
    half = made(sd_pipeline, **ONE_LEVEL).to(torch.float16)
    with pytest.raises(UserError, match="no finite states"):
        weighted_prompts(half, ["a (((cat:100):100):100)"])  # above float16's 65,504
    assert torch.isfinite(weighted_prompts(sd, ["(a:-1) (b:0)"])["prompt_embeds"]).all()


def test_the_page_reads_both_syntaxes_and_says_which_in_the_picture(tmp_path):
    engine = open_engine(tmp_path)
    prompt = "a (red:1.6) star left of a blue ring on a dotted mint background"
    plain, weighted = (run(engine, prompt=prompt, prompt_syntax=syntax).columns[0].pictures[0] for syntax in ("plain", "a1111"))
    assert not np.array_equal(pixels(plain), pixels(weighted))
    assert weighted.metadata["prompt_syntax"] == "a1111" and "prompt_syntax" not in plain.metadata
    for picture, syntax in ((plain, "plain"), (weighted, "a1111")):
        found, notes = request_from_metadata(picture.metadata, engine)
        assert found["prompt_syntax"] == syntax and not notes
        assert prompt in Image.open(picture.path).info["parameters"]
    drawn = run(engine, seed=-1).columns[0].pictures[0]
    assert f"Seed: {drawn.metadata['seed']}," in Image.open(drawn.path).info["parameters"] and drawn.seed >= 0
    for prompt, told in (("a <lora:style:1>", "EXPERT"), ("a [b:c:0.5]", "at a step")):
        with pytest.raises(UserError, match=told):
            engine.job(ASKED | {"prompt": prompt, "prompt_syntax": "a1111"})
    with pytest.raises(UserError, match="prompt syntax 'a1112'.*did you mean 'a1111'"):
        engine.job(ASKED | {"prompt_syntax": "a1112"})


def test_plain_prompts_say_which_option_reads_them_and_a1111s_do_not(sd):
    interface = afa.Ensemble.from_experts([sd], aggregator="mean").denoiser.interface
    prompt = r"a ((red)) house \(big\), " + "a dog, " * 30
    told = " ".join(unread([prompt], interface, [sd.tokenizer], syntax="plain"))
    assert told.count("--prompt-syntax a1111") == 2 and r"((red)), \(, \)" in told
    assert "--prompt-syntax" not in " ".join(unread([prompt], interface, [sd.tokenizer]))
    assert unread([prompt], interface, [sd.tokenizer], syntax="a1111") == []
    (rest,) = unread(["a {red|blue} (cat)++ in __colours__"], interface, [sd.tokenizer], syntax="a1111")
    assert all(piece in rest for piece in ("{red|blue}", "(cat)++", "__colours__"))
