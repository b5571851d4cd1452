"""One ordinary model out: distil an ensemble into a checkpoint or a LoRA, and make LoRAs of differences."""
