"""glmctl: one command-line toolkit for the whole life of a GLM-4.5-style model."""

__version__ = "0.1.0"
