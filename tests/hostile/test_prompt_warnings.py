"""What a model does not read of a prompt as it is meant is said once, with the part that is lost."""

import logging

import pytest
import torch
from tiny import quiet, sd_pipeline, sdxl_pipeline, tokenizer
from tiny_transformers import flux_pipeline, qwen_image_pipeline, sd3_pipeline

from afa.models.registry import FAMILIES, interface_of
from afa.prompts import lost_parts, plain_text, unread, warn_of_prompts
from afa.training.conditions import encode_prompt

INTERFACE = FAMILIES["unet"].interface
PIPELINES = [sd_pipeline, sdxl_pipeline, sd3_pipeline, flux_pipeline, qwen_image_pipeline]
WORDS = [f"{colour} {thing}" for colour in ("red", "Blue", "grün", "pale") for thing in ("ring", "cat,", "house") for _ in range(60)]


def tokenizers_of(pipe):
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    return [getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None]


def states(pipe, prompt):
    return [part for part in encode_prompt(pipe, [prompt], torch.device("cpu"), guided=False) if isinstance(part, torch.Tensor)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("make", PIPELINES)
def test_what_is_called_cut_off_is_exactly_what_the_model_does_not_read(make):
    pipe = quiet(make())
    interface, tokenizers, prompt = interface_of(pipe)[0], tokenizers_of(pipe), " ".join(WORDS)
    lost = lost_parts([prompt], interface, tokenizers)[1][0]
    kept, (cut_word, _, _) = prompt.removesuffix(lost), lost.partition(" ")
    assert len(kept) > 50
    read = states(pipe, prompt)
    assert same(read, states(pipe, f"{kept}{cut_word} and what else there is to say"))
    at = kept.rstrip().rindex(" ")
    assert not same(read, states(pipe, kept[:at]))
    assert lost_parts([kept[:at]], interface, tokenizers)[1] == {}


def test_prompts_that_fit_are_passed_over_and_those_that_do_not_are_counted():
    long = "a cat " * 60
    sentences = unread(["a cat", long, "a dog", f"{long}on a mat"], INTERFACE, [tokenizer()])
    assert len(sentences) == 1 and sentences[0].startswith("2 of 4 prompts are longer than the 77 tokens") and 'of prompt 2: "a cat' in sentences[0]
    assert unread(["a cat", "the C++ book (red): 12:30, [1] A & B"], INTERFACE, [tokenizer()]) == []


@pytest.mark.parametrize(
    "piece",
    [
        *("(red:1.3)", "(a red ring :.5)", "(red:-1)", "[a:b:0.5]", "[cat:10]", "[cat|dog]", "{a|b}", "((red))", "(red ring)++"),
        *("<lora:style:0.8>", "<LORA:x:1>", "<hypernet:y:1>", "<lyco:z>", "BREAK", "AND", "embedding:bad-hands.v2", "__colours__"),
    ],
)
def test_syntax_of_other_programs_is_named(piece):
    (sentence,) = plain_text([f"a ring, {piece} on white"])
    assert sentence.startswith("the prompt is written in") and piece in sentence
    assert ("EXPERT+FILE*STRENGTH" in sentence) == ("lora" in piece.lower() or "hyper" in piece or "lyco" in piece)
    assert not list(plain_text(["CATS AND DOGS BREAK OUT", "a band", "breakfast", "f(x)", "<cat-toy> ring"]))


def test_a_run_is_told_once_and_diffusers_does_not_say_it_again(capsys):
    diffusers_logger = logging.getLogger("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    pipe = sd_pipeline()
    before = logging.getLogger("diffusers").level
    logging.getLogger("diffusers").setLevel(logging.WARNING)
    try:
        for _ in range(2):
            warn_of_prompts(["a cat " * 40 + "(once:1.1)"], INTERFACE, [tokenizer()], "caption")
        encode_prompt(pipe, ["a cat " * 40], torch.device("cpu"), guided=False)
        diffusers_logger.warning("something else")
    finally:
        logging.getLogger("diffusers").setLevel(before)
    told = capsys.readouterr().err
    assert told.count("the caption is longer than the 77 tokens") == 1 and told.count("(once:1.1)") >= 1
    assert "was truncated because" not in told
