"""Ways to combine models while sampling, without training, and the sampler that all methods share."""
