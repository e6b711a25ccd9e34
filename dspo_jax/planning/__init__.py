"""Memory and time of a step on devices that are not here."""
