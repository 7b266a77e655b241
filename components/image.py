"""The default container image of all components; `pipelines.pipeline.make_pipeline` accepts another one."""

import scop

IMAGE = f"scop-python:{scop.__version__}"
