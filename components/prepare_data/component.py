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
    """Read the images, cut off a validation split and pack them.

    Args:
        data: the configuration's section `data`.
        dataset: arrays that memory-map, with their description.
    """
    from scop.runtime.execution import execute

    execute("prepare_data", {"data": data}, {}, {"dataset": dataset.path})
