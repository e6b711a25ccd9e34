"""Preference pairs from a model's own images."""
