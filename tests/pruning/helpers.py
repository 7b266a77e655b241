"""Networks and comparisons for the tests of `scop.pruning`."""

import torch
from torch import nn

from scop import make_model
from tests.helpers import randomise_batch_norms


def make_random_model(factory: str, arguments: dict[str, int]) -> nn.Module:
    """Return a network in eval mode with random weights and batch norms."""
    torch.manual_seed(1)
    model = make_model(factory, **arguments)
    randomise_batch_norms(model)
    return model.eval()


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest absolute difference."""
    return float((a - b).detach().abs().max())


class Own(nn.Module):
    """A user's own network."""

    def __init__(self, width: int = 8, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.a, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.b, self.other = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.unused = nn.Conv2d(4, 4, 1)
        self.layer_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = torch.relu(self.norm(self.a(x)))
        y = self.other(self.b(x))
        if self.kind == "dropout":
            y = nn.functional.dropout(y, 0.1, self.training)
        if self.kind != "plain":
            y = x + y
        y = y.mean((2, 3))
        return self.head(self.layer_norm(y) if self.kind == "layer_norm" else y)
