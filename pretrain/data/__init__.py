"""From shards to batches: manifest -> order -> samples -> images -> batches."""
