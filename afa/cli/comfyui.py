"""Install the nodes for ComfyUI: ensembles of ComfyUI's own models, with their LoRAs and ControlNets.

It copies a small folder into custom_nodes; its README explains the nodes. They are in this package, so
ComfyUI's Python needs afa, too.
"""

from afa.comfyui.settings import ComfyuiSettings as Options

EXAMPLES = [
    "afa comfyui --install ~/ComfyUI",
    "afa comfyui --install .",
]


def run(options: Options) -> None:
    """Copy the nodes, and say what is left to do."""
    from pathlib import Path

    from afa.comfyui.install import install
    from afa.places import as_typed

    target = install(Path(options.install).expanduser())
    print(
        f"nodes copied to {as_typed(str(target))}; start ComfyUI again, and look for AFA Ensemble. "
        "ComfyUI's Python needs afa: python -m pip install FOLDER-OF-AFA, with that Python"
    )
