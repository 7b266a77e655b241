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


def test_compiled_pipeline_equals_the_golden_file(compiled: str) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(compiled)
    assert compiled == GOLDEN.read_text(), (
        "if the change is intended: UPDATE_GOLDEN=1 make test ARGS=tests/pipelines/test_pipeline.py"
    )


def test_has_a_component_per_step_and_a_parameter_per_section(compiled: str) -> None:
    spec = yaml.safe_load(compiled)
    names = {name.removeprefix("exec-").replace("-", "_") for name in spec["deploymentSpec"]["executors"]}
    assert names == set(STEPS)
    assert set(spec["root"]["inputDefinitions"]["parameters"]) == set(Config.model_fields) - {"run"}


def test_passes_a_section_only_to_steps_that_use_it(compiled: str) -> None:
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


def test_folder_docker_does_not_shadow_the_docker_sdk() -> None:
    import docker

    assert docker.DockerClient
