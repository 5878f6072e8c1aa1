"""Scores: extractors, features, references, metrics. Must not know jobs."""
