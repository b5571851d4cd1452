"""The head that the aesthetic predictor and ImageReward have in common: five linear layers, nothing between them."""

from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the linear layers in the published files; between the first of them was dropout


class Head(nn.Module):
    """(B, width) -> (B, 1), with the published names: layers.0, layers.2, layers.4, layers.6, layers.7."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linear = {place: nn.Linear(before, after) for place, before, after in zip(PLACES, (width, *WIDTHS), WIDTHS, strict=False)}
        self.layers = nn.Sequential(*(linear.get(place, nn.Identity()) for place in range(max(PLACES) + 1)))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden)
