"""The pipeline: the DAG, its compilation, and running it on this machine."""
