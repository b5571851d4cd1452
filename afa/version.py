"""The version of afa."""

__version__ = "0.1.0"
