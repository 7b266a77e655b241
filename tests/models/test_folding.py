"""Batch norms folded into the convolutions."""

import torch
from torch import nn

from scop import make_model
from scop.models.folding import folded_copy
from scop.pruning.graph import ChannelGraph
from tests.helpers import randomise_batch_norms


class Odd(nn.Module):
    """A batch norm shared by two convolutions, a convolution that never runs, and a parametrised one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.shared = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.unused = nn.Conv2d(3, 3, 1)
        self.c, self.norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8)
        self.d = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.b(torch.relu(self.shared(self.a(x)))))
        return self.head(self.d(torch.relu(self.norm(self.c(torch.relu(x))))).mean((2, 3)))


def test_folded_copy_computes_the_same_function() -> None:
    torch.manual_seed(0)
    for model in (Odd(), make_model("resnet20", in_channels=1), make_model("tests.networks:Plain")):
        randomise_batch_norms(model.eval())
        folded = folded_copy(model, ChannelGraph(model, (1, 8, 8)), torch.float32)
        images = torch.randn(4, 1, 8, 8)
        assert torch.allclose(folded(images), model(images), rtol=1e-3, atol=1e-3)
