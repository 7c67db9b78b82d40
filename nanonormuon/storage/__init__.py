"""What lies on disk: files, tensors, shards, checkpoints, run directories."""
