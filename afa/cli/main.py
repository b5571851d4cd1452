"""`afa VERB …`: find the command, run it, and turn errors into sentences and exit codes."""

import argparse
import atexit
import contextlib
import dataclasses
import gc
import importlib
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator
from typing import Any

from afa.cli.flags import add_flags, read_flags
from afa.errors import UserError
from afa.pages.tables import listing
from afa.places import EMBEDDED, as_typed, on_hub
from afa.settings import PLACES, read_recipe
from afa.version import __version__

# verb -> module with Options, EXAMPLES and run(options); its docstring is the help
COMMANDS = {
    "inspect": "afa.cli.inspect",
    "screen": "afa.cli.screen",
    "merge": "afa.cli.merge",
    "search": "afa.cli.search",
    "extract": "afa.cli.extract",
    "train": "afa.cli.train",
    "finetune": "afa.cli.finetune",
    "distill": "afa.cli.distill",
    "generate": "afa.cli.generate",
    "calibrate": "afa.cli.calibrate",
    "explain": "afa.cli.explain",
    "evaluate": "afa.cli.evaluate",
    "report": "afa.cli.report",
    "demo": "afa.cli.demo",
    "push": "afa.cli.push",
    "ui": "afa.cli.ui",
    "comfyui": "afa.cli.comfyui",
}
MODELS = ", ".join(f"demo:{name}" for name in EMBEDDED)
EMBEDDED_HELP = f"small models that come with afa and can replace any model: {MODELS}; data: scenes:200"
TRACEBACK = "--traceback"
LONGEST = 400  # characters of an unexpected error


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 invalid input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        parser = build_parser(given)
        if not given:
            parser.print_help()
            return 0
        if (listed := _listed(given)) is not None:
            print(listed)
            return 0
        parsed = parser.parse_args(given)
        module = importlib.import_module(COMMANDS[parsed.command])
        _quiet_libraries()
        gc.set_threshold(50_000)  # imports make half a million objects that stay: look for garbage seldom
        atexit.register(gc.freeze)  # and not when all is done: it takes the interpreter a second to end
        with _first_speaks():
            module.run(_with_folders(read_flags(module.Options.current(), parsed)))
    except (UserError, NotImplementedError) as error:
        return _say(str(error), 2, given)
    except KeyboardInterrupt as interrupt:
        return _say(str(interrupt) or "interrupted", 130, given)
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has closed the pipe
        return 0
    except OSError as error:
        return _say(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1, given)
    except Exception as error:
        return _say(_unexpected(error, given), 1, given)
    return 0


def build_parser(arguments: list[str]) -> argparse.ArgumentParser:
    """Return the parser; only the verb in the arguments gets its flags."""
    parser = argparse.ArgumentParser(
        prog="afa",
        description="Combine several text-to-image diffusion models into one"
        " (Adaptive Feature Aggregation, arXiv:2405.17082).",
        epilog="`afa VERB --help` shows the options of a verb and examples.",
    )
    parser.add_argument("--version", action="version", version=f"afa {__version__}")
    _add_traceback(parser)
    verbs = parser.add_subparsers(dest="command", metavar="VERB", required=True)
    for verb, path in COMMANDS.items():
        module: Any = importlib.import_module(path)
        summary, _, rest = (module.__doc__ or "").strip().partition("\n")
        command = verbs.add_parser(
            verb,
            help=summary,
            description=f"{summary}\n{textwrap.dedent(rest)}",
            epilog="examples:\n" + textwrap.indent("\n".join(module.EXAMPLES), "  ") + f"\n\n{EMBEDDED_HELP}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_traceback(command)
        if verb in arguments:
            options = module.Options.current()
            add_flags(command, options, _preset(verb, options, arguments))
    return parser


def _with_folders(options: Any) -> Any:
    """Return the options with the folder of an ensemble in place of org/name@revision; it is downloaded.

    An option that takes experts too keeps the name of a repository that is no ensemble.
    """
    fields = dataclasses.fields(options) if dataclasses.is_dataclass(options) else ()
    folders: dict[str, Any] = {}
    for field in fields:
        value = getattr(options, field.name) if field.metadata.get("ensemble") else None
        several = isinstance(value, list)
        place = value[0] if several and len(value) == 1 else value
        if not isinstance(place, str) or on_hub(place) is None:
            continue
        from afa.checkpoint.hub import fetch_ensemble, fetch_if_ensemble

        folder = fetch_if_ensemble(place) if several else fetch_ensemble(place)
        if folder is not None:
            folders[field.name] = [str(folder)] if several else str(folder)
    return dataclasses.replace(options, **folders) if folders else options


@contextlib.contextmanager
def _first_speaks() -> Iterator[None]:
    """Of several processes (torchrun, accelerate launch), only the first one prints results."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with io.StringIO() as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _listed(arguments: list[str]) -> str | None:
    """Return what `afa VERB --FLAG list` prints: the names that a flag takes; None for other commands."""
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    lists = getattr(importlib.import_module(COMMANDS[verb]), "LISTS", {}) if verb in COMMANDS else {}
    for flag, lines in lists.items():
        reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        reader.add_argument(f"--{flag}", nargs="*")
        if getattr(reader.parse_known_args(arguments)[0], flag) == ["list"] and not {"-h", "--help"} & set(
            arguments
        ):
            return listing([flag, "what it is"], lines())
    return None


def _preset(verb: str, options: type, arguments: list[str]) -> dict[str, Any]:
    """Return the values of --recipe by field. Raises UserError if it cannot be read."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--recipe", "--preset")
    recipe = reader.parse_known_args(arguments)[0].recipe if verb in PLACES else None
    return {} if recipe is None else read_recipe(verb, recipe, options)


def _quiet_libraries() -> None:
    """Turn off the libraries' warnings, which would hide the result. For their progress bars, see hush."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _add_traceback(parser: argparse.ArgumentParser) -> None:
    """Add --traceback, before and after the verb; it has no default, so that neither overwrites the other."""
    parser.add_argument(
        TRACEBACK,
        action="store_true",
        default=argparse.SUPPRESS,
        help="if a command fails, show where in the program",
    )


def _unexpected(error: Exception, given: list[str]) -> str:
    """Return the sentence for an unexpected error."""
    words = " ".join(str(error).split())[:LONGEST] or "no reason is given"
    if "out of memory" in words.lower() or isinstance(error, MemoryError):
        return f"out of memory: {words}"
    advice = "" if TRACEBACK in given else f"; {TRACEBACK} shows where"
    return f"{type(error).__name__}: {words}{advice}"


def _say(sentence: str, code: int, given: list[str]) -> int:
    """Print why a command ends, and with --traceback where it failed; return the exit code."""
    if TRACEBACK in given:
        traceback.print_exc()
    print(f"afa: {as_typed(sentence)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())


def hush() -> None:
    """Turn off the progress bars of loading weights and components, which would hide our own."""
    import diffusers
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # transformers turns these off with its own
