"""Training data: records, their order, batches, and the loader that ties them together."""
