"""The container image of all components, named in one place."""

import os

import scop

# By digest in a cluster profile; the default is the project's own name and version.
IMAGE = os.environ.get("SCOP_IMAGE", f"scop-python:{scop.__version__}")
