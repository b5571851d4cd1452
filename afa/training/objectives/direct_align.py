"""`reward`: the gradient of an image reward through a one-step recovery at any noise (Direct-Align).

Source: Shen et al., SRPO, arXiv:2509.06942, section 3.1: known noise is put into a clean image, the model makes one step, and what is
left of the known noise is taken out analytically, so that even at much noise an image can be judged.
"""

from torch import Tensor

from afa.training.noise import Noising
from afa.training.objectives.base import Objective, Pass
from afa.training.objectives.decode import Decoder
from afa.training.rewards import Reward


class DirectAlign(Objective):
    """Minus the reward of the recovered image; a sample without its caption has none.

    From x_i = signal x0 + noise ε the model claims (x̂0, ε̂). A deterministic sampler goes with these to an earlier step j, where the
    known ε is taken out: x0' = x̂0 + r_j / r_i · (x0 - x̂0), r = noise / signal. So the image is that of the data as far as the
    step does not reach, and the model's as far as it does. reach: j = (1 - reach) · i; 1: the model's own x̂0.
    Deviation: x0 is a training image's latent, not one the model has drawn before (their "offline" form).
    """

    def __init__(self, noising: Noising, decoder: Decoder, reward: Reward, reach: float) -> None:
        self.noising, self.decoder, self.reward, self.reach = noising, decoder, reward, reach

    def loss(self, work: Pass) -> Tensor:
        rewards = self.reward(self.decoder(self.recovered(work)), work.captions)
        return -rewards * (~work.dropped).to(rewards.device, rewards.dtype)

    def recovered(self, work: Pass) -> Tensor:
        """x0' (B, C, h, w)."""
        if self.reach == 1:
            return work.clean
        steps = work.batch.steps
        earlier = (steps * (1 - self.reach)).long()
        left = self.noising.ratio(earlier) / self.noising.ratio(steps)
        return work.clean + left * (work.batch.latents - work.clean)
