"""drawbench: the 200 prompts of DrawBench, four images each.

Source: Saharia et al., arXiv:2205.11487; the prompts are published as a table of Prompts and Category. They are not
shipped here: give the file with --protocol-data.
"""

import csv
import json
from pathlib import Path

from afa.errors import UserError
from afa.evaluation.protocols.base import Protocol, Request

PROMPTS, COPIES, STEPS = 200, 4, 50
HOLDS = "DrawBench's table of 200 prompts (.csv, .tsv or .jsonl with a column Prompts)"


def protocol(request: Request) -> Protocol:
    """200 prompts × 4 images. Raises UserError if the prompts cannot be had, or are not 200."""
    path = request.data_folder("drawbench", HOLDS)
    captions = read_table(path)
    if len(captions) != PROMPTS:
        raise UserError(f"{path} holds {len(captions)} prompts, DrawBench has {PROMPTS}; for prompts of your own give the file as --protocol")
    metrics = ("imagereward", "pickscore", "hpsv2", "aesthetic")
    return Protocol("drawbench", request.items(captions, COPIES), request.sampling(STEPS), metrics, request.scheduler)


def read_table(path: Path) -> list[str]:
    """The column Prompts (or prompt) of a table, in its order. Raises UserError if there is none."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
        names = [name for name in ("Prompts", "prompts", "Prompt", "prompt") if rows and name in rows[0]]
        return [str(row[names[0]]).strip() for row in rows if str(row[names[0]] or "").strip()]
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not {HOLDS} ({error!r})") from None
