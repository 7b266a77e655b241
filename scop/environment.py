"""The environment variables that scop reads and sets."""
