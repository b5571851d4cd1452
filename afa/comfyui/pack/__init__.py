"""What ComfyUI loads from custom_nodes: the nodes themselves are in the Python package afa."""

try:
    from afa.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "afa":
        raise
    raise ModuleNotFoundError(
        "the nodes of afa need the Python package afa (with afa.comfyui) in the Python that runs ComfyUI; "
        "install it there with: python -m pip install FOLDER-OF-AFA",
        name=error.name,
    ) from None

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
