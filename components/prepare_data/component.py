"""Step 1: data preparation."""

from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Output

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare_data(
    data: dict[str, Any],
    dataset: Output[Dataset],
) -> None:
    """Read the images, split off validation data and store everything as arrays.

    Args:
        data: section `data` of the configuration.
        dataset: arrays that can be memory-mapped, and their description.
    """
    from scop.runtime.execution import execute

    execute("prepare_data", {"data": data}, {}, {"dataset": dataset.path})
