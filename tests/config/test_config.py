"""Configurations: parsing, overrides, files and the reference page."""

from pathlib import Path

import pytest

from pipelines.presets import FOLDER, find_config, run_name_of
from scop import UserError
from scop.config import (
    Config,
    ConfigWithoutFinetuning,
    DistillationSection,
    FinetuneSection,
    VariantSection,
    finetune_for,
    load_config,
)
from scop.config.parsing import parse
from scop.storage.cache import Cache


def error_message(values: dict[str, object]) -> str:
    with pytest.raises(UserError) as caught:
        parse(Config, values)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"finetun": {}}, "configuration key 'finetun' is unknown (did you mean 'finetune'?)"),
        ({"finetune": {"epoch": 3}}, "configuration key 'finetune.epoch' is unknown (did you mean 'epochs'?)"),
        ({"finetune": {"distillation": {"wieght": 1}}}, "(did you mean 'weight'?)"),
        ({"variants": [{"prunerate": 0.3}]}, "configuration key 'variants.0.prunerate' is unknown (did you mean 'prune_rate'?)"),
        ({"variants": [{"prune_rate": 1.0}]}, "configuration 'variants.0.prune_rate' is 1.0: must be in [0, 1)"),
        ({"variants": [{"prune_rate": -0.1}]}, "configuration 'variants.0.prune_rate' is -0.1"),
        ({"data": {"source": "cifar10"}}, "configuration 'data': path is missing"),
        ({"variants": []}, "configuration 'variants' is []"),
        ({"variants": [{}, {}]}, "variants: the name 'scop-0.45' is used twice"),
        ({"variants": [{"name": "a/b"}]}, "configuration 'variants.0.name' is 'a/b'"),
        ({"variants": [{"name": "a" * 57, "seeds": [0, 1]}]}, "-seed0', longer than 60 characters"),
        ({"data": {"mean": [float("nan")]}}, "configuration 'data.mean.0' is nan"),
        ({"knockoff": {"batch_size": 1}}, "configuration 'knockoff.batch_size' is 1"),
        ({"variants": [{"name": "v", "finetune": {"epoch": 3}}]}, "configuration key 'variants (v).finetune.epoch' is unknown"),
        ({"dense": {"epochs": 2.5}}, "configuration 'dense.epochs' is 2.5"),
        ({"dense": {"epochs": 2, "warmup_epochs": 2}}, "warmup_epochs 2.0 must be below epochs 2"),
        ({"finetune": {"distillation": {"mirror": True}}}, "distillation.mirror needs flip: true"),
        ({"dense": {"lr": float("nan")}}, "configuration 'dense.lr' is nan"),
        ({"knockoff": {"betas": [0.5]}}, "configuration 'knockoff.betas"),
        ({"dense": {"seed": -1}}, "configuration 'dense.seed' is -1"),
        ({"run": {"name": "../elsewhere"}}, "configuration 'run.name' is '../elsewhere'"),
        ({"run": {"experiment": "a/b"}}, "configuration 'run.experiment' is 'a/b'"),
        ({"data": {"source": "mnist"}}, "configuration 'data.source' is 'mnist'"),
    ],
)  # fmt: skip
def test_rejects_bad_configurations(values: dict[str, object], expected: str) -> None:
    assert expected in error_message(values)


def test_run_name_comes_from_the_configuration_file() -> None:
    assert [run_name_of(Path(name)) for name in ("my.yaml", "o'neil (2).yaml", "é.yaml")] == ["my", "o-neil-2", "run"]


def test_accepts_whole_numbers_as_floats() -> None:
    config = parse(Config, {"dense": {"epochs": 3.0}, "data": {"channels": 3.0}, "evaluate": {"batch_sizes": [1.0]}})
    arguments = parse(Config, {"dense": {"arguments": {"width": 64.0, "rates": [0.5, 2.0]}}}).dense.arguments
    assert repr(arguments) == "{'width': 64, 'rates': [0.5, 2]}"
    assert (config.dense.epochs, config.data.channels, config.evaluate.batch_sizes) == (3, 3, [1])


def test_configuration_survives_a_json_round_trip() -> None:
    for preset in FOLDER.glob("*.yaml"):
        config = load_config(preset)
        dumped = config.model_dump(mode="json", exclude_none=True)
        assert parse(Config, dumped) == config


def test_overrides_set_values_or_name_the_mistake(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("variants:\n  - {name: a, prune_rate: 0.2}\n")
    config = load_config(path, ["finetune.epochs=3", "variants.0.prune_rate=0.3", "knockoff.betas=[0.1, 0.2]"])
    assert config.finetune.epochs == 3
    assert config.variants[0].prune_rate == 0.3
    assert config.knockoff.betas == (0.1, 0.2)
    path.write_text("variants:\n  - {name: a, prune_rate: 0.2, budget: null}\n")
    (variant,) = load_config(path, ["variants.0.budget.macs=0.5"]).variants
    assert variant.budget is not None
    assert variant.budget.macs == 0.5
    path.write_text("finetune: {epochs: 2}\n")
    assert load_config(path, ["variants.0.prune_rate=0.3"]).variants[0].prune_rate == 0.3
    path.write_text("variants:\n  - {name: a, prune_rate: 0.2}\n")
    for override, message in (
        ("finetune.epochs", "must have the form section.key=value"),
        ("variants.7.prune_rate=0.3", "there is no such entry"),
        ("variants.0.name.x=1", "there is no such entry"),
        ("finetune.epochs=[", "is not valid YAML"),
        ("finetune.epoch=3", "did you mean 'epochs'"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(path, [override])


def test_variant_overrides_fine_tuning() -> None:
    section = finetune_for(FinetuneSection(epochs=5, lr=0.1), VariantSection(finetune={"epochs": 7}))
    assert (section.epochs, section.lr) == (7, 0.1)
    distillation = DistillationSection(weight=0.5, attention=50, attention_until=1)
    section = finetune_for(
        FinetuneSection(distillation=distillation), VariantSection(finetune={"distillation": {"weight": 0.9}})
    )
    assert section.distillation == distillation.model_copy(update={"weight": 0.9})


def test_without_fine_tuning_variant_entries_are_not_validated() -> None:
    values = {"variants": [{"name": "v", "finetune": {"distillation": {"mirror": True}}}]}
    assert "distillation.mirror needs flip: true" in error_message(values)
    assert parse(ConfigWithoutFinetuning, values).variants[0].finetune == values["variants"][0]["finetune"]


def test_default_label_is_method_and_rate() -> None:
    assert VariantSection().label == "scop-0.45"
    assert VariantSection(method="none").label == "none"
    assert VariantSection(name="mine").label == "mine"


def test_rejects_files_that_are_not_configurations(tmp_path: Path, cache: Cache) -> None:
    path = tmp_path / "config.yaml"
    for content, message in (
        ("a: [", "is not valid YAML"),
        ("- 1", "must hold a mapping of sections, not list"),
        ("finetune: {epochs: 1}\nfinetune: {lr: 0.1}", "duplicate key 'finetune'"),
        ("finetune: {epochs: 1, epochs: 2}", "duplicate key 'epochs'"),
        ("[1]: 2", "is not valid YAML"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            load_config(path)
    with pytest.raises(UserError, match="did you mean 'digits-resnet20'"):
        find_config("digit-resnet20", cache)
    assert find_config("digits-resnet20", cache).is_file()


def test_reference_page_is_complete_and_up_to_date() -> None:
    from pipelines.reference import PATH, render, undocumented

    assert undocumented() == []
    assert PATH.read_text() == render(), "run make docs"


def test_seeds_expand_to_one_variant_each() -> None:
    variants = [{"method": "random", "seeds": [3, 5], "finetune": {"epochs": 2}}, {"method": "none"}]
    found = parse(Config, {"variants": variants}).variants
    assert [variant.label for variant in found] == ["random-0.45-seed3", "random-0.45-seed5", "none"]
    assert [variant.seed for variant in found] == [3, 5, 0]
    assert found[1].finetune == {"epochs": 2, "seed": 5}
    again = parse(Config, {"variants": [variant.model_dump() for variant in found]}).variants
    assert again == found  # parsing a recorded configuration changes nothing
    with pytest.raises(UserError, match="'random-0.45-seed3' is used twice"):
        parse(Config, {"variants": [{"method": "random", "seeds": [3, 3]}]})
