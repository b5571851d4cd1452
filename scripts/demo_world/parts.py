"""The parts that all experts share: tokenizer, text encoder and VAE; and the scorer and the reward."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from afa.demo.scorer import answers_of
from scripts.demo_world.fit import Schedule, fit, mixed_precision
from scripts.demo_world.worlds import FAR_PLAN, WorldPlan

TOKENS = 24


def degrade(images: Tensor, rng: torch.Generator) -> Tensor:
    """Add the faults of generated images: contrast, tint, blur, grain, blotches, a shift.."""
    n = len(images)

    def between(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.rand(n, channels, 1, 1, generator=rng) * (high - low) + low

    def now_and_then(share: float) -> Tensor:
        return (torch.rand(n, 1, 1, 1, generator=rng) < share).float()

    shift = torch.randint(-3, 4, (2,), generator=rng).tolist()
    images = torch.roll(images, shift, (2, 3)) * between(0.8, 1.2) + between(-0.16, 0.16)
    images = images * between(0.92, 1.08, channels=3)
    small = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    blur = between(0, 1) * now_and_then(0.6)
    images = torch.lerp(images, F.interpolate(small, size=64, mode="bilinear"), blur)
    grain = torch.randn(images.shape, generator=rng) * between(0, 0.24)
    blotches = F.interpolate(torch.randn(n, 3, 16, 16, generator=rng), size=64, mode="bicubic")
    return (images + grain + blotches * between(0, 0.2) * now_and_then(0.5)).clamp(-1, 1)


def build_scorer(plan: WorldPlan, work: Path, quick: int) -> nn.Module:
    """Train the scorer on degraded renders of every combination of attributes."""
    torch.manual_seed(1)
    return _judge("scorer", plan, plan.world.network(), plan.scorer_steps, degrade, (5, 9), work, quick)


def build_reward(plan: WorldPlan, work: Path, quick: int) -> nn.Module:
    """Train the reward, which shares no scenes, weights or degradations with the scorer."""
    torch.manual_seed(11)
    return _judge(
        "reward", plan, plan.world.reward_network(), plan.reward_steps, spoil, (15, 19), work, quick
    )


def _judge(
    name: str,
    plan: WorldPlan,
    net: nn.Module,
    schedule: Schedule,
    damage: Callable[[Tensor, torch.Generator], Tensor],
    seeds: tuple[int, int],
    work: Path,
    quick: int,
) -> nn.Module:
    """Train a network to name a scene's attributes on damaged renders.

    seeds: of the scenes, and of their renders
    """
    schedule = schedule.divided(quick)
    scenes = plan.everything(12000 // quick, seeds[0])
    images, truth = plan.draw(scenes, seeds[1]), plan.world.labels(scenes)

    def loss(rng: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (schedule.batch,), generator=rng)
        logits = answers_of(net(damage(images[chosen].float() / 127.5 - 1, rng)), plan.world.classes)
        return sum(
            (F.cross_entropy(answer, truth[chosen, k]) for k, answer in enumerate(logits)), torch.zeros(())
        )

    fit(name, net, loss, schedule, work)
    return net.eval()


def spoil(images: Tensor, rng: torch.Generator) -> Tensor:
    """Add the faults that a reward meets in training: blends of two images, strong blur, grain.."""
    n = len(images)
    share = torch.rand(n, 1, 1, 1, generator=rng) * 0.35
    images = torch.lerp(images, images.roll(1, 0), share)
    size = (64, 32, 16, 8)[int(torch.randint(4, (1,), generator=rng))]
    blurred = F.interpolate(F.interpolate(images, size=size, mode="area"), size=64, mode="bilinear")
    images = torch.lerp(images, blurred, torch.rand(n, 1, 1, 1, generator=rng))
    contrast = 0.7 + 0.5 * torch.rand(n, 3, 1, 1, generator=rng)
    return (
        images * contrast
        + torch.randn(images.shape, generator=rng) * torch.rand(n, 1, 1, 1, generator=rng) * 0.3
    )


def build_tokenizer(plan: WorldPlan, folder: Path) -> CLIPTokenizer:
    """Make a CLIP tokenizer with one token for each word of the captions."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(code) for code in range(33, 127)]
    special = [letter + end for letter in letters for end in ("", "</w>")]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        end_of_word_suffix="</w>",
        special_tokens=special,
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator([word for word in plan.words for _ in range(10)], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocabulary = dict(sorted(learnt["vocab"].items(), key=lambda item: item[1]))
    for end in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[end] = len(vocabulary)
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in plan.words)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    lines = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)])
    (folder / "merges.txt").write_text(lines + "\n")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return tokenizer


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, 24) token ids."""
    ids: Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def build_text_encoder(plan: WorldPlan, tokenizer: CLIPTokenizer, work: Path, quick: int) -> CLIPTextModel:
    """Train a CLIP text model to predict all attributes of a caption from its last token."""
    schedule = Schedule(3000 // quick, 2e-3, batch=128)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(2)
    both = nn.ModuleDict(
        {"encoder": CLIPTextModel(config), "heads": nn.Linear(64, sum(map(len, plan.world.classes.values())))}
    )
    scenes = plan.everything(20000 // quick, 6)
    ids, truth = token_ids(tokenizer, [scene.caption for scene in scenes]), plan.world.labels(scenes)

    def loss(rng: torch.Generator) -> Tensor:
        chosen = torch.randint(len(ids), (schedule.batch,), generator=rng)
        logits = answers_of(both["heads"](both["encoder"](ids[chosen]).pooler_output), plan.world.classes)
        return sum(
            (F.cross_entropy(answer, truth[chosen, k]) for k, answer in enumerate(logits)), torch.zeros(())
        )

    fit("text", both, loss, schedule, work)
    return both["encoder"].eval()


def build_autoencoder(work: Path, quick: int) -> AutoencoderKL:
    """Train the VAE on renders of all attributes: 64×64 pixels to 16×16×4 latents of unit variance."""
    schedule = Schedule(2500 // quick, 2e-3, batch=16)
    images = FAR_PLAN.draw(FAR_PLAN.everything(12000 // quick, 7), 10)
    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )

    def loss(rng: torch.Generator) -> Tensor:
        pixels = images[torch.randint(len(images), (schedule.batch,), generator=rng)].float() / 127.5 - 1
        with mixed_precision():
            spread = vae.encode(pixels).latent_dist
            latents = spread.sample(rng)
            back = vae.decode(latents).sample
        return (back.float() - pixels).abs().mean() + 1e-4 * spread.kl().float().mean() / latents[0].numel()

    fit("vae", vae, loss, schedule, work)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        deviation = vae.encode(images[:256].float() / 127.5 - 1).latent_dist.mode().std().item()
    vae.register_to_config(scaling_factor=round(1 / deviation, 4))
    return vae
