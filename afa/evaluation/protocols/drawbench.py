"""drawbench: the 200 prompts of DrawBench, four images each.

Source: Saharia et al., arXiv:2205.11487; the prompts are published as a table of Prompts and Category. They are not
shipped here: give the file with --protocol-data.
"""

import csv
import io
from pathlib import Path

from afa.errors import UserError
from afa.evaluation.protocols.base import Protocol, Request
from afa.text_files import read_json_lines, read_text

PROMPTS, COPIES, STEPS = 200, 4, 50
HOLDS = "DrawBench's table of 200 prompts (.csv, .tsv or .jsonl with a column Prompts)"


def protocol(request: Request) -> Protocol:
    """200 prompts × 4 images. Raises UserError if the prompts cannot be had, or are not 200."""
    path = request.data_folder("drawbench", HOLDS)
    captions = read_table(path)
    if len(captions) != PROMPTS:
        found = f"{len(captions)} {'prompt' if len(captions) == 1 else 'prompts'}"
        raise UserError(f"{path} holds {found}, DrawBench has {PROMPTS}; for prompts of your own give the file as --protocol")
    metrics = ("imagereward", "pickscore", "hpsv2", "aesthetic")
    return Protocol("drawbench", request.items(captions, COPIES), request.sampling(STEPS), metrics, request.scheduler)


def read_table(path: Path) -> list[str]:
    """The column Prompts (or prompt) of a table, in its order. Raises UserError if there is none."""
    try:
        if path.suffix == ".jsonl":
            rows = [row for _, row in read_json_lines(path)]
        else:
            lines = io.StringIO(read_text(path), newline="")
            rows = list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
        names = [name for name in ("Prompts", "prompts", "Prompt", "prompt") if rows and name in rows[0]]
        return [str(row[names[0]]).strip() for row in rows if str(row[names[0]] or "").strip()]
    except UserError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not {HOLDS} ({error!r})") from None
