"""The table of protocols."""

import importlib
from pathlib import Path

from afa.errors import UserError
from afa.evaluation.protocols.base import Protocol, Request
from afa.lookup import unknown

# name -> module with `protocol(request) -> Protocol`; imported when asked for, so that a protocol may live beside its data
PROTOCOLS: dict[str, str] = {
    "scenes": "afa.demo.protocol",
    "coco2017": "afa.evaluation.protocols.coco",
    "drawbench": "afa.evaluation.protocols.drawbench",
}


def make_protocol(name: str, request: Request) -> Protocol:
    """A protocol by name, or from a user's file of prompts or folder of captioned images.

    Raises UserError for a name that is neither, or for data that is missing.
    """
    if name in PROTOCOLS:
        made: Protocol = importlib.import_module(PROTOCOLS[name]).protocol(request)
        return made
    if not Path(name).exists():
        raise UserError(unknown(name, PROTOCOLS, "protocol (or file of prompts, or folder of captioned images)"))
    from afa.evaluation.protocols.own import protocol

    return protocol(Path(name), request)
