"""The pipeline: the DAG, local runs, clusters, comparison and the command line."""
