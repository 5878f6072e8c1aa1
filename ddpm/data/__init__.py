"""Images: sources, one packed array, batches addressed by step. Must not know ranks beyond a slice, jobs or scores."""
