"""Encoded preference pairs: written once, read in an order that can be taken up again."""
