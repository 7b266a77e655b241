"""The pipeline's steps, one module each; `scop.runtime` runs them."""
