"""The key map between diffusers' and the original layout, held against diffusers' own converters."""

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from original_transformers import originals
from tiny import sd_unet, sdxl_unet, text_encoder, vae
from tiny_transformers import flux_transformer, sd3_transformer
from torch import Tensor, nn

from afa.experts.description import describe_config
from afa.experts.headers import current_name
from afa.experts.transformer_places import (
    Place,
    from_original,
    names_by_key,
    shape_from_original,
    shape_to_original,
    to_original,
)
from afa.merging.single_file import original_places

OPEN_CLIP = {"hidden_act": "gelu", "width": 24}


def as_original(part: str, module: nn.Module, **layout: bool) -> dict[str, Tensor]:
    """A part's weights under their original names."""
    own = {current_name(name): tensor for name, tensor in module.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    places = original_places(part, shapes, module, **layout)
    return {key: to_original([own[name] for name in names], places[names[0]].form) for key, names in names_by_key(places).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    one, other = ({current_name(name): tensor for name, tensor in each.items()} for each in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("unet", [sd_unet(), sdxl_unet(), sd_unet(use_linear_projection=True)], ids=["sd1", "sdxl", "sd2"])
def test_a_unet_survives_the_round_trip_through_diffusers_converter(unet):
    assert same(converters.convert_ldm_unet_checkpoint(as_original("unet", unet), unet.config), unet.state_dict())


def test_a_vae_survives_the_round_trip_through_diffusers_converter():
    model = vae()
    original = as_original("vae", model)
    assert original["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    assert same(converters.convert_ldm_vae_checkpoint(original, model.config), model.state_dict())


@pytest.mark.parametrize("xl", [False, True])
def test_a_clip_encoder_survives_the_round_trip_through_diffusers_converter(xl):
    encoder = text_encoder()
    assert same(converters.convert_ldm_clip_checkpoint(as_original("text_encoder", encoder, xl=xl)), encoder.state_dict())


@pytest.mark.parametrize(
    ("part", "xl", "prefix"),
    [("text_encoder", False, "cond_stage_model.model."), ("text_encoder_2", True, "conditioner.embedders.1.model.")],
)
def test_an_open_clip_encoder_survives_the_round_trip_through_diffusers_converter(part, xl, prefix):
    encoder = text_encoder(projected=xl, **OPEN_CLIP, projection_dim=24)
    original = as_original(part, encoder, xl=xl, open_clip=True)
    assert f"{prefix}transformer.resblocks.1.attn.in_proj_weight" in original
    assert same(converters.convert_open_clip_checkpoint(encoder, original, prefix=prefix), encoder.state_dict())


FORMS = {
    "same": [Place("k")],
    "conv": [Place("k", "conv")],
    "transposed": [Place("k", "transposed")],
    "swapped": [Place("k", "swapped")],
    "thirds": [Place("k", rows=(start, start + 4)) for start in (0, 4, 8)],
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_go_there_and_back(name):
    places = FORMS[name]
    tensors = [torch.randn(4, 6) for _ in places]
    original = to_original(tensors, places[0].form)
    assert tuple(original.shape) == shape_to_original([(4, 6)] * len(places), places[0].form)
    for place, tensor in zip(places, tensors, strict=True):
        assert shape_from_original(original.shape, place) == (4, 6)
        assert torch.equal(from_original(original, place), tensor)


@pytest.mark.parametrize("make", [sd3_transformer, lambda: sd3_transformer(dual_attention_layers=(0, 1), qk_norm="rms_norm")], ids=["sd3", "sd35"])
def test_an_sd3_transformer_survives_the_round_trip_through_diffusers_converter(make):
    model = make()
    assert same(converters.convert_sd3_transformer_checkpoint_to_diffusers(as_original("transformer", model)), model.state_dict())


@pytest.mark.parametrize("guidance", [True, False])
def test_a_flux_transformer_has_the_places_that_its_publisher_gives(guidance):
    """diffusers' converter splits at the real model's width; the reverse is written out in original_transformers.py."""
    model = flux_transformer(guidance_embeds=guidance)
    written = as_original("transformer", model)
    expected = dict(originals("flux", model.state_dict()))
    assert {name.removeprefix("model.diffusion_model.") for name in written} == expected.keys()
    assert all(torch.equal(written[f"model.diffusion_model.{name}"], tensor) for name, tensor in expected.items())


def real_names(config: str) -> set[str]:
    """Every name a checkpoint of a real architecture gets from us."""
    parts = describe_config("real", config).parts
    xl = "text_encoder_2" in parts
    opened = {"text_encoder": config.startswith("sd21"), "text_encoder_2": True}
    shapes = {part: {current_name(name): tensor.shape for name, tensor in model.state_dict().items()} for part, model in parts.items()}
    places = [
        original_places(part, own, parts[part], xl=xl, open_clip=opened.get(part, False)) for part, own in shapes.items()
    ]
    return {place.key for each in places for place in each.values()}


# What files of these architectures hold, by prefix (U-Net, VAE, text encoders); SD 2.x' last text layer and its
# projection are not used, and not in a diffusers folder.
COUNTS = {
    "sd15": {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.": 196},
    "sd21": {"model.diffusion_model.": 686, "first_stage_model.": 248, "cond_stage_model.": 4 + 23 * 12},
    "sdxl": {"model.diffusion_model.": 1680, "first_stage_model.": 248, "conditioner.embedders.0.": 196, "conditioner.embedders.1.": 5 + 32 * 12},
}


@pytest.mark.parametrize("config", COUNTS)
def test_real_architectures_have_as_many_names_as_their_published_files(config):
    names = real_names(config)
    assert {prefix: sum(name.startswith(prefix) for name in names) for prefix in COUNTS[config]} == COUNTS[config]
    assert sum(COUNTS[config].values()) == len(names)


def test_names_without_a_place_are_refused():
    for part, model in (("unet", sd_unet()), ("transformer", flux_transformer())):
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()} | {"class_embedding.weight": (4,)}
        with pytest.raises(ValueError, match=r"no place for class_embedding\.weight"):
            original_places(part, shapes, model)
