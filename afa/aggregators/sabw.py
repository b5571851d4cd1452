"""SABW: the Spatial-Aware Block-Wise aggregator of AFA (arXiv:2405.17082, section 3.2 and figure 3)."""

from collections.abc import Sequence

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from afa.aggregators.base import Aggregator, in_dtype
from afa.aggregators.options import SEEN
from afa.errors import look_up


class SABW(Aggregator):
    """Weighs the experts at every pixel by all their features, the time and the text.

    experts, channels, time_width, text_width: N, C, E and D of the stage it fuses
    hidden: width inside, a multiple of heads. Cost grows with its square; 128 is the paper's
    heads:  of the attention; the paper's 8 heads are 16 wide
    depth:  transformer layers; the paper's is 2. Self-attention costs (H·W)², the larger part of the cost on
            big maps. 0 leaves out the transformer and with it all knowledge of the text, at about a quarter
            of the parameters
    dropout: share of the activations that is dropped at random in training
    ignore: of SEEN, what the weights must not depend on, for ablations: the text states or the time embedding
            are taken as zeros; without place, one weight per expert serves the whole map

    An untrained one is the mean: conv_out starts at zero, so the softmax starts at 1/N everywhere.
    The names of the sub-modules are those of the reference release, so that its files load. Deviation: none.
    """

    def __init__(
        self,
        *,
        experts: int,
        channels: int,
        time_width: int,
        text_width: int,
        hidden: int,
        heads: int,
        depth: int,
        dropout: float = 0.0,
        ignore: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden {hidden} is not a multiple of heads {heads}; choose widths that divide")
        for name in ignore or ():
            look_up(name, dict.fromkeys(SEEN), "thing that weights depend on,")
        self.ignore = frozenset(ignore or ())
        groups = 32 if hidden % 32 == 0 else heads  # diffusers' default where it divides, as in the release
        self.conv_in = nn.Conv2d(experts * channels, hidden, 1)
        self.res_block = ResnetBlock2D(
            in_channels=hidden, temb_channels=time_width, groups=groups, dropout=dropout
        )
        self.transformer = (
            Transformer2DModel(
                heads,
                hidden // heads,
                hidden,
                num_layers=depth,
                dropout=dropout,
                cross_attention_dim=text_width,
                norm_num_groups=groups,
            )
            if depth
            else None
        )
        self.conv_out = nn.Conv2d(hidden, experts, 1, bias=False)
        nn.init.zeros_(self.conv_out.weight)

    @property
    def reads(self) -> bool:
        return self.transformer is not None and "text" not in self.ignore

    def cross_attentions(self) -> list[nn.Module]:
        if self.transformer is None or not self.reads:
            return []
        return [block.attn2 for block in self.transformer.transformer_blocks]

    def weigh(
        self, features: Sequence[Tensor], temb: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        return torch.softmax(self.logits(features, temb, text, text_mask), dim=1)  # (B, N, H, W)

    def logits(
        self, features: Sequence[Tensor], temb: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """Return what the softmax is taken of, (B, channels of conv_out, H, W), at least float32.

        Arguments as of weigh().
        """
        dtype = features[0].dtype
        hidden = in_parts(self.conv_in, features)  # (B, hidden, H, W)
        temb = _seen(temb, "time" not in self.ignore).to(dtype)
        hidden = in_dtype(self.res_block, dtype)(hidden, temb)
        if self.transformer is not None:
            text = _seen(text, "text" not in self.ignore).to(dtype)
            hidden = in_dtype(self.transformer, dtype)(
                hidden, encoder_hidden_states=text, encoder_attention_mask=text_mask, return_dict=False
            )[0]
        logits: Tensor = in_dtype(self.conv_out, dtype)(hidden)
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        return logits.mean((2, 3), keepdim=True).expand_as(logits) if "place" in self.ignore else logits


def in_parts(conv: nn.Conv2d, features: Sequence[Tensor]) -> Tensor:
    """Return a 1×1 convolution of the experts' features side by side, without laying them side by side.

    conv:     from N·C channels
    features: N × (B, C, H, W)
    Returns (B, channels, H, W) in the features' dtype: the sum of N products, each added to the last.
    """
    batch, channels, height, width = features[0].shape
    assert conv.bias is not None
    kernels = conv.weight.flatten(1).to(features[0].dtype).split(channels, dim=1)  # N × (hidden, C)
    hidden = conv.bias.to(features[0].dtype)[:, None].expand(batch, -1, height * width)
    for kernel, own in zip(kernels, features, strict=True):
        hidden = torch.baddbmm(hidden, kernel.expand(batch, -1, -1), own.flatten(2))
    return hidden.unflatten(2, (height, width))


def _seen(condition: Tensor, seen: bool) -> Tensor:
    return condition if seen else torch.zeros_like(condition)
