"""From shards and images to scores: extractors, features, references, metrics, the score record. Knows no job."""
