"""Experts, the models that are combined: how they are specified, located, compared and loaded."""
