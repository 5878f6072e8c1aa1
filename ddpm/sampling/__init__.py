"""Sample sets: the request, the shards on disk, and how a shard is computed. Knows no job."""
