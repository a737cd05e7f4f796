"""What makes data sets: sources -> shards, indexes, manifest."""
