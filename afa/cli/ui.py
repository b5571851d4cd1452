"""Open a page in the browser: prompts, methods side by side, weight maps, strengths of experts, a gallery, reports.

Without SOURCE it shows the embedded ensemble. It listens at this machine only, reads and writes one folder, and loads
nothing from elsewhere. Its functions can be called by name (gradio_client): see its tab About. Ctrl-C stops it.
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
