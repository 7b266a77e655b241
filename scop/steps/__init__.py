"""The pipeline's steps, one module each; see `scop.runtime` for how they are run."""
