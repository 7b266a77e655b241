"""Networks: the CIFAR ResNets, and a lookup of other factories by name.

The configuration names a factory in one of these forms:

* ``resnet20``, ``resnet32``, ``resnet44``, ``resnet56``, ``resnet110``: the CIFAR ResNets below;
* ``torchvision:resnet50``: any classification model of torchvision, with random weights;
* ``my_package.nets:make_net``: any callable that takes ``num_classes`` and returns an ``nn.Module``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from scop.config import CIFAR_RESNETS, DenseSection
from scop.errors import UserError
from scop.pruning.spec import ModelSpec, attach_spec


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first convolution has the stride."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
            if stride != 1 or in_channels != channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """The ResNet for small images of He et al., 2015 (arXiv 1512.03385, section 4.2), depth 6n + 2.

    Args:
        depth: 20, 32, 44, 56 or 110.
        num_classes: number of outputs.
        in_channels: number of input channels: 3 for colour, 1 for grey images.

    Shape:
        (N, in_channels, H, W) -> (N, num_classes), with H and W at least 4.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._layer(16, 16, blocks, stride=1)
        self.layer2 = self._layer(16, 32, blocks, stride=2)
        self.layer3 = self._layer(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _layer(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def make_model(factory: str, **arguments: Any) -> nn.Module:
    """Build the network that ``factory`` names, with random weights.

    Args:
        factory: a name in one of the forms listed at the top of this module.
        arguments: keyword arguments of the factory: ``num_classes``, ``in_channels`` if it accepts that, and others.

    Raises:
        UserError: the factory does not exist, does not accept these arguments or returns no module, or the arguments
            are not JSON values.
    """
    make = find_factory(factory)
    try:
        model = make(**arguments)
    except TypeError as error:
        raise UserError(f"model {factory!r} does not accept {arguments}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model {factory!r} returned a {type(model).__name__}, not an nn.Module")
    try:
        return attach_spec(model, ModelSpec(factory=factory, arguments=arguments))
    except ValidationError as error:
        raise UserError(
            f"arguments of model {factory!r} must be JSON values (numbers, strings, lists, dicts), not {arguments}"
        ) from error


def network_for(section: DenseSection, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build the network that a configuration names, with random weights.

    Args:
        section: the settings of the dense network.
        shape: (C, H, W) of an image.
        classes: number of classes.

    Raises:
        UserError: the factory does not exist, or does not accept the arguments or C channels.
    """
    arguments = {"num_classes": classes, **section.arguments}
    if accepts_channels(section.model):
        arguments.setdefault("in_channels", shape[0])
    elif section.model.startswith("torchvision:") and shape[0] != 3:
        raise UserError(
            f"dense.model {section.model!r} accepts only colour images, but these are grey; set data.channels: 3"
        )
    return make_model(section.model, **arguments)


def accepts_channels(factory: str) -> bool:
    """Whether the factory has an ``in_channels`` argument; torchvision's models accept only 3 channels."""
    try:
        return "in_channels" in inspect.signature(find_factory(factory)).parameters
    except ValueError:
        return False


def _cifar_resnet(depth: int) -> Callable[..., nn.Module]:
    def make(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
        return CifarResNet(depth, num_classes, in_channels)

    return make


def find_factory(name: str) -> Callable[..., nn.Module]:
    """Return the factory with this name.

    Raises:
        UserError: the name is unknown, or the factory cannot be imported.
    """
    if name in CIFAR_RESNETS:
        return _cifar_resnet(CIFAR_RESNETS[name])
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(
            f"model {name!r} is unknown; use {', '.join(CIFAR_RESNETS)}, 'torchvision:NAME' or "
            "'package.module:function'"
        )
    if module == "torchvision":
        return _torchvision_factory(attribute)
    try:
        found = getattr(import_user_module(module), attribute)
    except ImportError as error:
        raise UserError(f"model {name!r}: cannot import {module!r} ({error}); check PYTHONPATH") from error
    except AttributeError as error:
        raise UserError(f"model {name!r}: module {module!r} has no {attribute!r}") from error
    return found


def import_user_module(name: str) -> Any:
    """Import a user's module, also from the current folder: console scripts, unlike ``python -m``, do not search it."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    return importlib.import_module(name)


def _torchvision_factory(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    # The classifiers are in torchvision.models itself; detection, segmentation and video are in submodules.
    classifiers = models.list_models(module=models)
    if name not in classifiers:
        hint = difflib.get_close_matches(name, classifiers, n=1)
        meant = f" (did you mean 'torchvision:{hint[0]}'?)" if hint else ""
        raise UserError(f"torchvision has no classification model {name!r}{meant}")
    builder = models.get_model_builder(name)

    def make(num_classes: int = 1000, **arguments: Any) -> nn.Module:
        # Inception and GoogLeNet return a tuple in training mode unless their auxiliary heads are disabled.
        if "aux_logits" in inspect.signature(_builder_class(builder)).parameters:
            arguments.setdefault("aux_logits", False)
        if name in ("inception_v3", "googlenet"):
            arguments.setdefault("init_weights", False)
        return builder(weights=None, num_classes=num_classes, **arguments)

    return make


def _builder_class(builder: Callable[..., nn.Module]) -> Any:
    """Return the class that a torchvision builder instantiates; its constructor has the parameters."""
    annotation = inspect.signature(builder).return_annotation
    if isinstance(annotation, str):
        annotation = getattr(inspect.getmodule(builder), annotation, builder)
    return annotation
