"""Answer questions over documents that a language model has already read."""

__version__ = "0.1.0"
