"""Small networks for tests, each with one property that pruning must handle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    """Three convolutions in a row, with batch norms; for 8x8 images."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.second_norm = nn.BatchNorm2d(24)
        self.first_norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.third = nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False)
        self.third_norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # In-place functional activations: they have no modules.
        x = torch.relu_(self.first_norm(self.first(x)))
        x = torch.relu_(self.second_norm(self.second(x)))
        x = torch.relu_(self.third_norm(self.third(x)))
        return self.head(x.mean((2, 3)))


class GroupsAndBias(nn.Module):
    """Grouped, dilated and depthwise convolutions with biases, an addition without batch norm, a wide flatten."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(16, eps=1e-3, momentum=0.3)
        self.grouped = nn.Conv2d(16, 24, 3, padding=2, dilation=2, groups=4)
        self.grouped_norm = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project = nn.Conv2d(24, 16, 1)
        self.wide = nn.Conv2d(16, 20, 3, stride=2, padding=1)
        self.wide_norm = nn.BatchNorm2d(20)
        self.head = nn.Linear(20 * 8 * 8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.grouped_norm(self.grouped(x)))
        y = self.project(torch.relu(self.depthwise(y)))
        x = torch.relu(self.wide_norm(self.wide(x + y)))
        return self.head(x.flatten(1))


class Offset(nn.Module):
    """An activation that is not 0 at 0: a channel held at 0 still contributes, a removed one does not."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(torch.sigmoid(self.norm(self.conv(x)))).mean((2, 3)))


class View(Plain):
    """A forward that works only on contiguous (N, C, H, W) feature maps."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__(num_classes, in_channels)
        self.head = nn.Linear(32 * 2 * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))
        return self.head(x.view(len(x), -1))


class Aliased(Plain):
    """Layers with two names each; the forward uses the second."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__(num_classes, in_channels)
        layers = [self.first, self.first_norm, nn.ReLU(), self.second, self.second_norm, nn.ReLU()]
        self.features = nn.Sequential(*layers, self.third, self.third_norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class OneConvolutionBlocks(nn.Module):
    """Residual blocks of one convolution on a stream with a group norm: only scattering can prune them."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norm, self.head = nn.GroupNorm(4, 16), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(torch.relu(x))
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


class OnlyLinear(nn.Module):
    """A network without convolutions."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def small_densenet(num_classes: int = 10) -> nn.Module:
    """A torchvision DenseNet with three blocks of two layers."""
    from torchvision.models.densenet import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 2, 2), num_init_features=16, num_classes=num_classes)


class Vgg(nn.Module):
    """A narrow VGG (Simonyan and Zisserman, 2015) with batch norms, for 32x32 images; without shortcuts."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in ((32, 1), (64, 2), (128, 2), (128, 1), (256, 2), (256, 1)):
            layers += [
                nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class PaddedBlock(nn.Module):
    """A residual block whose shortcut pads the missing channels with zeros (He et al., 2015, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.more:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + shortcut)


def padded_resnet(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """A small ResNet with option A shortcuts."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        PaddedBlock(16, 16, 1),
        PaddedBlock(16, 32, 2),
        PaddedBlock(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def small_convnext(num_classes: int = 10) -> nn.Module:
    """A torchvision ConvNeXt with two stages: layer norms, and linear layers as 1x1 convolutions."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)], num_classes=num_classes)
