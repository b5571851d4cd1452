"""The architectures of which configs ship. No heavy imports: the command line's help names them."""

# name of a shipped config -> the models that it is of
KNOWN_CONFIGS = {
    "sd15": "Stable Diffusion 1.x",
    "sd21": "Stable Diffusion 2.x at 768 px",
    "sd21-base": "Stable Diffusion 2.x base",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "sd35": "Stable Diffusion 3.5 medium",
    "sd35-large": "Stable Diffusion 3.5 large",
    "flux": "FLUX.1 dev",
    "flux-schnell": "FLUX.1 schnell",
    "flux2": "FLUX.2 dev",
    "flux2-klein": "FLUX.2 klein 4B",
    "flux2-klein-9b": "FLUX.2 klein 9B",
    "flux2-klein-base": "FLUX.2 klein base 4B",
    "flux2-klein-base-9b": "FLUX.2 klein base 9B",
    "chroma": "Chroma",
    "z-image": "Z-Image",
    "qwen-image": "Qwen-Image",
    "qwen-image-2.1": "Qwen-Image 2.1",
    "krea2": "Krea 2",
    "krea2-turbo": "Krea 2 Turbo",
    "lumina2": "Lumina 2",
}

# name of a shipped config -> the hub's folder of that model, of which --frame reads configs and tokenizers
HUB_IDS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
    "flux": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "flux2": "black-forest-labs/FLUX.2-dev",
    "flux2-klein": "black-forest-labs/FLUX.2-klein-4B",
    "flux2-klein-9b": "black-forest-labs/FLUX.2-klein-9B",
    "chroma": "lodestones/Chroma1-HD",
    "z-image": "Tongyi-MAI/Z-Image",
    "qwen-image": "Qwen/Qwen-Image",
    "qwen-image-2.1": "Qwen/Qwen-Image-2.1",
    "krea2": "krea/Krea-2-Raw",
    "krea2-turbo": "krea/Krea-2-Turbo",
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0",
}
