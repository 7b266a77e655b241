"""The container image of all components, named in one place."""

import os

import scop

# By digest in a cluster profile; the default is what `make image` builds.
IMAGE = os.environ.get("SCOP_IMAGE", f"scop-python:{scop.__version__}")
