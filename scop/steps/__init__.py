"""The pipeline's steps, one module each, and the runtime that gives every one the same life."""
