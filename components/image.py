"""The default container image of all components; `pipelines.pipeline.make_pipeline` can replace it."""

import scop

IMAGE = f"scop-python:{scop.__version__}"
