"""weightfs: model weights, without the wait. See docs/design.md for the layers and their rules."""

__version__ = "0.1.0"
