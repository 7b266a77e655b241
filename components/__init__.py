"""The pipeline's KFP components, a folder each: typed artifacts, an import, one call."""
