"""The pipeline's KFP components, one folder each. A component only declares its artifacts and calls its step."""
