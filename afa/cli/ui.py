"""Serve a web page: prompts, methods side by side, weight maps, strengths of experts, a gallery, reports.

Without SOURCE it uses the embedded ensemble. By default the page listens on this machine only; it reads and
writes one folder, and loads nothing from other hosts. Programs can call its functions with gradio_client:
see the tab About. Ctrl-C stops it.
"""

import importlib.util

from afa.errors import UserError
from afa.webui.settings import UiSettings as Options

EXAMPLES = [
    "afa ui",
    "afa ui demo:ensemble --output pictures --max-steps 60",
    "afa ui demo:curves demo:angles --port 8000",
]


def run(options: Options) -> None:
    """Serve until Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("afa ui needs gradio, which is not installed; install it with: pip install 'afa[ui]'")
    from afa.cli.main import hush
    from afa.webui.serve import serve

    hush()
    serve(options)
