"""The `transferkit` command: a thin skin over the public API.

Nothing heavy is imported before the arguments are understood, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from transferkit import __version__
from transferkit.cli.backbones import add_backbones
from transferkit.cli.card import add_card
from transferkit.cli.check import add_check
from transferkit.cli.export import add_export
from transferkit.cli.features import add_features
from transferkit.cli.import_ import add_import
from transferkit.cli.info import add_info
from transferkit.cli.options import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK
from transferkit.cli.predict import add_predict
from transferkit.cli.train import add_train
from transferkit.errors import TransferkitError

__all__ = ["main", "make_parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The words after the command's name; None takes them from `sys.argv`.

    Returns:
        The exit code: 0 if all went well, 1 after an error, 3 where `predict` could not read
        some pictures, 130 after Ctrl-C. Wrong usage exits with 2.
    """
    options = make_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names need not be text in any encoding; showing one must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result: int = options.run(options)
        sys.stdout.flush()
    except TransferkitError as error:
        print(f"transferkit: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("transferkit: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough.
        sys.stderr.close()
        return EXIT_OK
    except OSError as error:
        print(f"transferkit: error: cannot write the output: {error}", file=sys.stderr)
        return EXIT_ERROR
    return result


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="transferkit", description="Transfer learning for image classification."
    )
    parser.add_argument("--version", action="version", version=f"transferkit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_train(commands)
    add_predict(commands)
    add_info(commands)
    add_card(commands)
    add_features(commands)
    add_export(commands)
    add_import(commands)
    add_check(commands)
    add_backbones(commands)
    return parser
