"""Words that pipelines of an ensemble are taught (textual inversion): once to the tokenizer, and to every text encoder behind it."""

import pytest
import torch
from test_lora_sharing import latents
from tiny import WORDS, sd_pipeline, sdxl_pipeline
from tiny_loras import write_lora

from afa import Ensemble, UserError, only_expert

PROMPT = "a <cube> on a lawn"


def vectors(width, count=1, seed=0):
    """Of a word, as diffusers saves them."""
    return {"<cube>": 3 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).squeeze(0)}


def taught(pipe, *loads):
    for source, options in loads:
        pipe.load_textual_inversion({**source}, **options(pipe))
    return pipe


def first(pipe):
    return {}


def second(pipe):
    return {"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2}


def ensemble(make, text_seeds=(0, 1)):
    return Ensemble.from_experts([make(seed, text_seed=text) for seed, text in enumerate(text_seeds)], aggregator="mean")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("text_seeds", [(0, 1), (0, 0)])
def test_every_expert_reads_the_word_as_its_own_pipeline_does(count, text_seeds):
    made = ensemble(sd_pipeline, text_seeds)
    pipe = taught(made.pipeline(), (vectors(24, count), first))
    assert len(pipe.tokenizer) == WORDS + count
    drawn = []
    for index, (name, text_seed) in enumerate(zip(made.names, text_seeds, strict=True)):
        alone = taught(sd_pipeline(index, text_seed=text_seed), (vectors(24, count), first))
        with only_expert(made.denoiser, name):
            drawn.append(latents(pipe, prompt=PROMPT))
        assert torch.equal(drawn[-1], latents(alone, prompt=PROMPT))
        assert not torch.equal(drawn[-1], latents(sd_pipeline(index, text_seed=text_seed), prompt=PROMPT))


def test_each_of_sdxls_encoders_is_taught_by_name():
    loads = [(vectors(16), first), (vectors(24, seed=1), second)]
    made = ensemble(sdxl_pipeline)
    pipe = taught(made.pipeline(), *loads)
    for index, name in enumerate(made.names):
        with only_expert(made.denoiser, name):
            alone = taught(sdxl_pipeline(index), *loads)
            assert torch.allclose(latents(pipe, prompt=PROMPT), latents(alone, prompt=PROMPT), atol=1e-5)


def test_a_word_can_be_forgotten():
    made = ensemble(sd_pipeline)
    pipe = made.pipeline()
    before = latents(pipe, prompt=PROMPT)
    taught(pipe, (vectors(24), first)).unload_textual_inversion("<cube>")
    assert len(pipe.tokenizer) == WORDS
    assert [encoder.get_input_embeddings().weight.shape[0] for encoder in made.text_encoders[0].encoders] == [WORDS] * 2
    assert torch.equal(latents(pipe, prompt=PROMPT), before)
    assert not any(parameter.requires_grad for parameter in made.text_encoders[0].parameters())


def test_encoders_that_share_their_vectors_go_on_to_share_them(tmp_path):
    sd_pipeline(0).save_pretrained(tmp_path / "base")
    file = write_lora("sd", tmp_path / "oil.safetensors", text=True)
    made = Ensemble.from_experts([f"plain={tmp_path / 'base'}", f"oil={tmp_path / 'base'}+{file}"], aggregator="mean")
    pipe = taught(made.pipeline(), (vectors(24), first))
    one, other = (encoder.get_input_embeddings().weight for encoder in made.text_encoders[0].encoders)
    assert one is other and one.shape[0] == WORDS + 1
    alone = sd_pipeline(0)
    alone.load_lora_weights(str(file))
    with only_expert(made.denoiser, "oil"):
        assert torch.allclose(latents(pipe, prompt=PROMPT), latents(taught(alone, (vectors(24), first)), prompt=PROMPT), atol=1e-5)


class TestRefusals:
    def test_vectors_of_another_width(self):
        made = ensemble(sdxl_pipeline)
        pipe = made.pipeline()
        with pytest.raises(UserError, match="does not fit text encoders that are 16 wide; give text_encoder="):
            pipe.load_textual_inversion(vectors(24))
        assert len(pipe.tokenizer) == WORDS
        assert {encoder.get_input_embeddings().weight.shape[0] for encoder in made.text_encoders[0].encoders} == {WORDS}

    def test_a_word_that_is_known(self):
        pipe = taught(ensemble(sd_pipeline).pipeline(), (vectors(24), first))
        with pytest.raises(ValueError, match="already in tokenizer vocabulary"):
            pipe.load_textual_inversion(vectors(24))

    def test_a_pipeline_of_ones_own(self):
        pipe = ensemble(sd_pipeline).pipeline()
        with pytest.raises(NotImplementedError, match=r"ensemble\.pipeline\(\)"):
            type(pipe)(**pipe.components, requires_safety_checker=False).load_textual_inversion(vectors(24))
