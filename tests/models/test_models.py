"""Model factories and loading of weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

from scop import UserError, make_model
from scop.models.artifacts import load_pretrained, load_weights
from scop.models.evaluation import count_macs, count_parameters
from tests.helpers import SHARED


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("resnet20", 272_282, 40.8e6),
        ("resnet32", 0.467e6, 69.1e6),
        ("resnet56", 0.856e6, 125.7e6),
        ("resnet110", 1.731e6, 253.1e6),
    ],
)
def test_cifar_resnets_match_the_reference_sizes(name: str, parameters: float, macs: float) -> None:
    model = make_model(name, num_classes=10)
    assert count_parameters(model) == pytest.approx(parameters, rel=1e-3)
    assert count_macs(model, (3, 32, 32)) == pytest.approx(macs, rel=1e-3)


def test_resnet44_has_the_reference_size() -> None:
    assert count_parameters(make_model("resnet44")) == pytest.approx(0.661e6, rel=2e-3)


def test_torchvision_resnet50_with_10_classes_has_the_reference_size() -> None:
    assert count_parameters(make_model("torchvision:resnet50", num_classes=10)) == 23_528_522


def test_accepts_grey_images() -> None:
    model = make_model("resnet20", num_classes=7, in_channels=1)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet65", "is unknown; use resnet20, resnet32, resnet44, resnet56, resnet110, "),
        ("torchvision:resnet5O", "did you mean 'torchvision:resnet50'"),
        ("no.such.package:make", "cannot import 'no.such.package'"),
        ("tests.networks:Nothing", "has no 'Nothing'"),
        ("tests.helpers:SHARED", "does not accept"),
    ],
)
def test_rejects_unknown_factories_with_a_hint(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_model(name, num_classes=10)


def test_rejects_torchvision_models_that_are_not_classifiers() -> None:
    with pytest.raises(UserError, match="no classification model"):
        make_model("torchvision:fasterrcnn_resnet50_fpn", num_classes=10)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "data_parallel", "nested"])
def test_loads_weights_from_every_file_format(kind: str, tmp_path) -> None:
    from safetensors.torch import save_file

    source, target = make_model("resnet20"), make_model("resnet20")
    state = source.state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "torch":
        torch.save(state, path)
    elif kind == "data_parallel":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save({"epoch": 3, "state_dict": state}, path)
    load_weights(target, path)
    assert all(torch.equal(value, state[key]) for key, value in target.state_dict().items())


class Evil:
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return (print, ("pickled code ran",))


def test_rejects_bad_weights_and_names_the_keys(tmp_path, capsys) -> None:
    model = make_model("resnet20")
    state = model.state_dict()
    short, extra, misshapen = dict(state), dict(state), dict(state)
    del short["layer1.0.conv1.weight"]
    extra["layer9.conv1.weight"] = torch.zeros(1)
    misshapen["fc.weight"] = torch.zeros(3, 64)
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not weights")
    for content, message in (
        (short, r"missing keys \(1\): layer1.0.conv1.weight"),
        (extra, r"unknown keys \(1\): layer9.conv1.weight"),
        (misshapen, "'fc.weight' has shape 3x64 in the file and 10x64 in the model"),
        ({"model": Evil()}, r"cannot be loaded with torch.load\(weights_only=True\)"),
        ([1, 2], "no state dict"),
    ):
        path = tmp_path / "weights.pt"
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            load_weights(model, path)
    with pytest.raises(UserError, match="damaged"):
        load_weights(model, garbage)
    with pytest.raises(UserError, match="do not exist"):
        load_weights(model, tmp_path / "nothing.pt")
    assert "pickled code ran" not in capsys.readouterr().out


def test_pretrained_weights_skip_a_head_with_other_classes(tmp_path: Path) -> None:
    known, model = make_model("resnet20", num_classes=100), make_model("resnet20", num_classes=2)
    head, path = model.fc.weight.clone(), tmp_path / "hundred.pt"
    torch.save(known.state_dict(), path)
    assert load_pretrained(model, path, classes=2) == ["fc"]
    assert torch.equal(model.layer1[0].conv1.weight, known.layer1[0].conv1.weight)
    assert torch.equal(model.fc.weight, head)
    same = make_model("resnet20", num_classes=100)
    assert load_pretrained(same, path, classes=100) == []
    assert torch.equal(same.fc.weight, known.fc.weight)
    with pytest.raises(
        UserError,
        match=r"2x64 in the model \(to start from weights for another number of classes, use dense.pretrained\)",
    ):
        load_weights(model, path)
    grey = make_model("resnet20", num_classes=2, in_channels=1)
    with pytest.raises(UserError, match="'conv1.weight' has shape 16x3x3x3 in the file and 16x1x3x3 in the model"):
        load_pretrained(grey, path, classes=2)


def test_shape_mismatch_suggests_pretrained_only_for_another_number_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"

    def message(**arguments: int) -> str:
        torch.save(make_model("tests.networks:Plain", **arguments).state_dict(), path)
        with pytest.raises(UserError) as error:
            load_weights(make_model("tests.networks:Plain"), path)
        return str(error.value)

    assert "use dense.pretrained" in message(num_classes=7)
    assert message(in_channels=3).endswith("has shape 16x3x3x3 in the file and 16x1x3x3 in the model")
    assert "dense.pretrained" not in message(in_channels=3, num_classes=7)

    wider = make_model("tests.networks:Plain").state_dict()
    for key in ("first.weight", "first.bias", "first_norm.weight"):
        wider[key] = torch.cat([wider[key], wider[key]])
    torch.save(wider, path)
    with pytest.raises(UserError, match="'first.weight' has shape 32x1x3x3 in the file and 16x1x3x3 in the model$"):
        load_weights(make_model("tests.networks:Plain"), path)


def test_names_the_type_of_a_loading_error_without_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EOFError

    (tmp_path / "weights.pt").touch()
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match=r"cannot be loaded with torch.load\(weights_only=True\): EOFError$"):
        load_weights(make_model("resnet20"), tmp_path / "weights.pt")


def test_loads_the_shared_resnet20_weights() -> None:
    path = SHARED / "weights" / "resnet20-cifar10.safetensors"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    model = make_model("resnet20", num_classes=10)
    load_weights(model, path)
    assert isinstance(model.get_submodule("layer2.0.downsample.0"), nn.Conv2d)
