"""The backends: thin adapters between a call's tensors and what computes."""


class LaunchRefused(RuntimeError):
    """The device refuses every way in which a backend could run a call. Nothing has run, and nothing is written."""
