"""Ensembles in ComfyUI: its networks read as stages, and the nodes; no node needs its core before it runs."""
