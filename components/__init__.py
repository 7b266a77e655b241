"""The KFP components of the pipeline, one folder each. A component only declares its artifacts and runs its step."""
