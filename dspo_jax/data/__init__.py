"""Encoded preference pairs: sources, encoding, shards, and a loader that resumes at any batch."""
