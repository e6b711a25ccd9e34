"""Time that a test moves."""


class FakeTime:
    """A clock that moves only when told."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds
