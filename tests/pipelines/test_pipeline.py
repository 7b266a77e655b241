"""The compiled pipeline: its golden file, and the sections that each step receives."""

import os
import re

import pytest
import yaml

from pipelines.pipeline import compile_pipeline
from scop.config import Config
from scop.runtime.registry import STEPS
from tests.helpers import ROOT

GOLDEN = ROOT / "tests" / "golden" / "pipeline.yaml"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_pipeline(str(path))
    return re.sub(r"sdkVersion: kfp-[\d.]+", "sdkVersion: kfp-X", path.read_text())


def test_the_compiled_pipeline_is_the_golden_file(compiled: str) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(compiled)
    assert compiled == GOLDEN.read_text(), (
        "if the change is meant: UPDATE_GOLDEN=1 make test ARGS=tests/pipelines/test_pipeline.py"
    )


def test_every_step_is_a_component_and_every_section_a_parameter(compiled: str) -> None:
    spec = yaml.safe_load(compiled)
    names = {name.removeprefix("exec-").replace("-", "_") for name in spec["deploymentSpec"]["executors"]}
    assert names == set(STEPS)
    assert set(spec["root"]["inputDefinitions"]["parameters"]) == set(Config.model_fields) - {"run"}


def test_a_section_reaches_only_the_steps_that_depend_on_it(compiled: str) -> None:
    components = yaml.safe_load(compiled)["components"]
    parameters = {
        name.removeprefix("comp-"): set(component.get("inputDefinitions", {}).get("parameters", {}))
        for name, component in components.items()
    }
    assert parameters["prepare-data"] == {"data"}
    assert parameters["train-dense"] == {"dense"}
    assert parameters["train-knockoff"] == {"knockoff"}
    assert parameters["select-channels"] == {"variant"}
    assert parameters["finetune"] == {"finetune", "variant"}
    assert parameters["compare"] == set()


def test_the_docker_sdk_is_not_shadowed_by_our_folder() -> None:
    import docker

    assert docker.DockerClient
