"""Import of published models, export of trained runs."""
