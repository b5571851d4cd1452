"""Ensembles in ComfyUI: its own networks read as stages, and the nodes. Nothing of ComfyUI is imported before a node runs."""
