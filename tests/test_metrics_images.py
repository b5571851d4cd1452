"""Metrics of single images: each against a computation by hand, on tiny real models saved as their publishers save them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from metric_models import (
    VOCABULARY,
    clip_folder,
    clip_model,
    head_shapes,
    images,
    open_clip_image,
    open_clip_shapes,
    open_clip_tensors,
    open_clip_text,
    pictures,
    random_tensors,
    resources,
    reward,
    reward_tensors,
)
from PIL import Image
from transformers import BertTokenizer, CLIPImageProcessorPil, CLIPModel

from afa.errors import UserError
from afa.experts.single_file import clip_tokenizer
from afa.metrics import imagereward
from afa.metrics.base import Picture
from afa.metrics.clip import VIT_L, shared_clip
from afa.metrics.open_clip import read_config, to_transformers
from afa.metrics.pixels import CLIP_MEAN, CLIP_STD, crop, pad, to_tensor
from afa.metrics.registry import make_metric
from afa.metrics.weights import find, transformer_loader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Every image metric's weights, as --metric-weights takes them."""
    home = tmp_path_factory.mktemp("weights")
    clip_folder(home / "clip")
    clip_folder(home / "clip-vit-large-patch14", width=768)
    torch.save(random_tensors(head_shapes(768), scale=0.1), home / "head.pth")
    torch.save({"epoch": 3, "state_dict": open_clip_tensors()}, home / "hps.pt")
    torch.save(reward_tensors(), home / "ImageReward.pt")
    (home / "vocab.txt").write_text("\n".join(VOCABULARY))
    return {
        "clip_t": home / "clip",
        "clip_i": home / "clip",
        "pickscore": home / "clip",
        "aesthetic": f"{home / 'head.pth'},{home / 'clip-vit-large-patch14'}",
        "hpsv2": home / "hps.pt",
        "imagereward": home,
    }


NAMES = ["clip_t", "clip_i", "aesthetic", "pickscore", "hpsv2", "imagereward"]


def referenced(count=5, **changes):
    """Pictures with real images."""
    real = images(count, seed=9)
    return [Picture(each.image, each.caption, each.group, real[k]) for k, each in enumerate(pictures(count, **changes))]


@pytest.mark.parametrize("name", NAMES)
def test_neither_batch_size_nor_order_matters(name, weights):
    shown = referenced()
    whole, single = (make_metric(name, resources(weights[name], size)).score(shown)[name] for size in (5, 1))
    turned = make_metric(name, resources(weights[name], 2)).score(shown[::-1])[name]
    assert whole.shape == (5,) and whole.dtype == np.float64
    assert whole.std() > 1e-4
    np.testing.assert_allclose(single, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(turned[::-1], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_says_what_its_numbers_depend_on(name, weights):
    metric = make_metric(name, resources(weights[name]))
    assert metric.names == (name,) and metric.higher_is_better
    assert "sha256" in metric.source
    assert any(len(word) == 64 for word in str(metric.identity).replace("'", " ").split())


def by_hand(model, shown):
    """Unit embeddings of images and captions, each through transformers' own processors."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pixels = processor([Image.fromarray(each.image) for each in shown], return_tensors="pt").pixel_values
    tokens = clip_tokenizer()([each.caption for each in shown], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    return out.image_embeds, out.text_embeds


def test_clip_t_is_the_cosine_of_image_and_caption(weights):
    shown = pictures()
    image, text = by_hand(clip_model(), shown)
    found = make_metric("clip_t", resources(weights["clip_t"])).score(shown)["clip_t"]
    np.testing.assert_allclose(found, (image * text).sum(1), atol=1e-5)
    assert (np.abs(found) <= 1).all()


def test_clip_i_of_the_real_image_itself_is_one(weights):
    metric = make_metric("clip_i", resources(weights["clip_i"]))
    same = [Picture(image, "a", 0, image.copy()) for image in images(3)]
    np.testing.assert_allclose(metric.score(same)["clip_i"], 1, atol=1e-6)
    assert (metric.score(referenced())["clip_i"] < 0.9999).all()


def test_clip_i_without_real_images_is_refused(weights):
    with pytest.raises(UserError, match="there is none of 'caption number 0'"):
        make_metric("clip_i", resources(weights["clip_i"])).score(pictures())


def test_pickscore_is_the_models_scale_times_the_cosine(weights):
    shown, model = pictures(), clip_model()
    image, text = by_hand(model, shown)
    expected = model.logit_scale.exp().item() * (image * text).sum(1)
    np.testing.assert_allclose(
        make_metric("pickscore", resources(weights["pickscore"])).score(shown)["pickscore"], expected, rtol=1e-4
    )


def test_metrics_of_one_clip_share_it(weights):
    clips = [make_metric(name, resources(weights[name])).clip for name in ("clip_t", "clip_i", "pickscore")]
    assert clips[0] is clips[1] is clips[2]


def test_nothing_is_looked_at_twice(weights, monkeypatch):
    metric = make_metric("clip_t", resources(weights["clip_t"]))
    shown = [Picture(image, f"seen {k}", k) for k, image in enumerate(images(6, seed=77))]
    metric.score(shown[:4])
    seen = []
    embed = metric.clip._embed
    monkeypatch.setattr(metric.clip, "_embed", lambda items, *rest: (seen.append(len(items)), embed(items, *rest))[1])
    metric.score(shown)
    assert seen == [2, 2]  # two new images, two new captions


def test_a_long_caption_is_cut_not_refused(weights):
    shown = [Picture(images(1)[0], "many words " * 200, 0)]
    for name in ("clip_t", "hpsv2", "imagereward"):
        assert np.isfinite(make_metric(name, resources(weights[name])).score(shown)[name]).all()


def test_the_aesthetic_head_is_five_linear_layers_on_the_unit_embedding(weights):
    shown = pictures()
    tensors = random_tensors(head_shapes(768), scale=0.1)
    hidden = by_hand(clip_model(width=768), shown)[0]
    for place in (0, 2, 4, 6, 7):
        hidden = hidden @ tensors[f"layers.{place}.weight"].T + tensors[f"layers.{place}.bias"]
    found = make_metric("aesthetic", resources(weights["aesthetic"])).score(shown)["aesthetic"]
    np.testing.assert_allclose(found, hidden[:, 0], rtol=1e-4, atol=1e-5)


def test_hpsv2_is_the_cosine_that_open_clip_computes(weights):
    shown = pictures()
    tensors = open_clip_tensors()
    pixels = to_tensor([pad(each.image, 16) for each in shown], CLIP_MEAN, CLIP_STD)
    tokens = clip_tokenizer("!")(
        [each.caption for each in shown], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    image, text = open_clip_image(tensors, pixels), open_clip_text(tensors, tokens)  # padded with zeros, as open_clip does
    expected = torch.cosine_similarity(image, text)
    found = make_metric("hpsv2", resources(weights["hpsv2"])).score(shown)["hpsv2"]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.ptp(found) > 1e-3


def test_the_sizes_of_the_published_hpsv2_are_read_from_its_tensors():
    shapes = open_clip_shapes(vision=1280, text=1024, projected=1024, patch=14, side=224, layers=(32, 24), inner=4)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = read_config(tensors, Path("hps.pt"))
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers, vision.num_attention_heads) == (224, 14, 32, 16)
    assert (text.num_hidden_layers, text.num_attention_heads, text.max_position_embeddings) == (24, 16, 77)
    assert round(sum(tensor.numel() for tensor in tensors.values()) / 1e6, 2) == 986.11  # as open_clip lists it
    transformer_loader(CLIPModel, config, to_transformers(tensors), Path("hps.pt"))


def test_pickled_weights_of_a_folder_are_the_same_weights(weights, tmp_path):
    model = clip_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    shown = pictures()
    pickled, safe = (make_metric("clip_t", resources(place)) for place in (tmp_path, weights["clip_t"]))
    np.testing.assert_allclose(pickled.score(shown)["clip_t"], safe.score(shown)["clip_t"], atol=1e-6)


def test_imagereward_is_the_standardised_reward_of_blip(weights):
    shown = pictures()
    tokenizer = BertTokenizer(str(weights["imagereward"] / "vocab.txt"))
    read = tokenizer([each.caption for each in shown], padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    pixels = to_tensor([crop(each.image, 16) for each in shown], CLIP_MEAN, CLIP_STD)
    raw = reward(reward_tensors(), pixels, read.input_ids, read.attention_mask)
    found = make_metric("imagereward", resources(weights["imagereward"])).score(shown)["imagereward"]
    np.testing.assert_allclose(found, (raw - 0.16717362830052426) / 1.0333394966054072, rtol=1e-4, atol=1e-4)
    assert np.ptp(found) > 1e-2


def test_captions_are_split_as_bert_splits_them(weights):
    vocabulary = weights["imagereward"] / "vocab.txt"
    text = "A cat, CATS number 7 élan"
    expected = BertTokenizer(str(vocabulary))(text, padding="max_length", max_length=35)
    found = imagereward.word_pieces(vocabulary).encode(text)
    assert found.ids == expected.input_ids and found.attention_mask == expected.attention_mask


def test_crossed_pairs_give_other_scores(weights):
    """A picture carries its caption, so only who crosses them on purpose gets crossed scores."""
    shown = pictures(4)
    crossed = [Picture(each.image, other.caption, each.group) for each, other in zip(shown, shown[1:] + shown[:1], strict=True)]
    for name in ("clip_t", "hpsv2", "imagereward"):
        metric = make_metric(name, resources(weights[name]))
        assert not np.allclose(metric.score(shown)[name], metric.score(crossed)[name], atol=1e-6)


def test_weights_that_changed_on_disk_are_another_clip(tmp_path, weights):
    folder = clip_folder(tmp_path / "clip", seed=5)
    first = shared_clip(find("clip_t", [VIT_L], str(folder))[0], CPU)
    clip_folder(folder, seed=6)
    second = shared_clip(find("clip_t", [VIT_L], str(folder))[0], CPU)
    assert first is not second


def without(tensors, part):
    """A checkpoint that lost some of its tensors."""
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (without(open_clip_tensors(), "ln_final"), r"hps.pt lacks 2 weights of a CLIPModel \(first: text_model.final_layer_norm"),
        ({"weights": torch.ones(2)}, "hps.pt is no CLIP checkpoint of open_clip"),
    ],
)
def test_an_incomplete_hpsv2_is_named_before_anything_is_scored(tmp_path, tensors, sentence):
    torch.save({"state_dict": tensors}, tmp_path / "hps.pt")
    with pytest.raises(UserError, match=sentence):
        make_metric("hpsv2", resources(tmp_path / "hps.pt"))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (without(reward_tensors(), "mlp.layers.7"), "ImageReward.pt lacks 2 of 10 weights"),
        (without(reward_tensors(), "blocks.1.attn.qkv"), "ImageReward.pt lacks 2 weights of a BlipVisionModel"),
        (without(reward_tensors(), "crossattention.self.key"), "ImageReward.pt lacks 4 weights of a BlipTextModel"),
        ({"a": torch.ones(2)}, "ImageReward.pt is no checkpoint of ImageReward"),
    ],
)
def test_an_incomplete_imagereward_is_named_before_anything_is_scored(tmp_path, tensors, sentence):
    torch.save(tensors, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    with pytest.raises(UserError, match=sentence):
        make_metric("imagereward", resources(tmp_path))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            [*VOCABULARY, *(f"word{k}" for k in range(20))],
            r"vocab.txt has 40 words, .*ImageReward.pt knows 30; they do not belong together",
        ),
        (["a", "b"], "vocab.txt is no vocabulary of BERT"),
    ],
)
def test_another_vocabulary_is_refused(tmp_path, words, sentence):
    torch.save(reward_tensors(), tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(UserError, match=sentence):
        make_metric("imagereward", resources(tmp_path))


def test_a_clip_folder_without_its_text_projection_is_refused(tmp_path):
    model = clip_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "text_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lacks 1 weights of a CLIPModel \(first: text_projection.weight\)"):
        make_metric("clip_t", resources(tmp_path))


def spoilt(tensors, part):
    """A checkpoint with one number that is none."""
    return {name: torch.full_like(tensor, torch.nan) if part in name else tensor for name, tensor in tensors.items()}


def nan_in_a_folder(home, weights):
    model = clip_model()
    model.save_pretrained(home, state_dict=spoilt(model.state_dict(), "text_projection.weight"))
    return home


def nan_in_a_head(home, weights):
    torch.save(spoilt(random_tensors(head_shapes(768), scale=0.1), "layers.7.bias"), home / "head.pth")
    return f"{home / 'head.pth'},{weights['aesthetic'].partition(',')[2]}"


def nan_in_open_clip(home, weights):
    torch.save({"state_dict": spoilt(open_clip_tensors(), "ln_final.bias")}, home / "hps.pt")
    return home / "hps.pt"


@pytest.mark.parametrize(
    ("name", "make", "tensor"),
    [
        ("clip_t", nan_in_a_folder, "text_projection.weight"),
        ("aesthetic", nan_in_a_head, "layers.7.bias"),
        ("hpsv2", nan_in_open_clip, "final_layer_norm.bias"),
    ],
)
def test_weights_that_are_no_numbers_are_named(name, make, tensor, weights, tmp_path):
    metric = make_metric(name, resources(make(tmp_path, weights)))
    with pytest.raises(UserError, match=rf"{tensor} is not finite"):
        metric.score(pictures())
