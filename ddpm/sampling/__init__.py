"""Sample sets: what one asks for, its shards on disk, and the making of a shard. Knows no job."""
