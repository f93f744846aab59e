# SPDX-License-Identifier: Apache-2.0
"""The command `sidechain`: finds the command, reports errors, and imports only what that needs.

Only light modules of the standard library are imported above `main`, so that Ctrl-C works from the
start and help needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .builder import Command, Parser

BUG, INTERRUPTED = 1, 130

#: Command -> its module in this package, and one line of help.
COMMANDS = {
    "demo": ("demo", "localize, steer and hear it: one HTML report"),
    "localize": ("localize", "measure through which sites a concept enters"),
    "capture": ("capture", "record activations of sites into a store on disk"),
    "vector": ("vector", "make a steering vector from prompt pairs"),
    "steer": ("steer", "sweep steering strengths and compare arms"),
    "sae train": ("sae_train", "train a dictionary, or continue a run"),
    "sae finish": ("sae_finish", "make the dictionary of a run as it is now"),
    "sae score": ("sae_score", "measure dictionaries and find the features of concepts"),
    "store import": ("store_import", "write activations of another program into a store"),
    "curves": ("curves", "score a table of sweeps: AUC and smoothness"),
    "impact": ("impact", "rank sites in a table of impacts"),
    "bench": ("bench", "time this machine: ops, hooks and training steps against plain torch"),
    "doctor": ("doctor", "report versions, libraries and what runs where"),
}

#: First word of commands of two words -> one line of help.
ROOMS = {
    "sae": "train and score dictionaries of a site",
    "store": "stores of activations on disk",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        0; 2 after bad input (one line on stderr); 1 after a bug (its traceback); 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("sidechain: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        import os

        # the reader has left (`sidechain curves T.csv | head`); keep the flush at exit quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _answer(error, "--traceback" in arguments)


def _run(arguments: list[str]) -> int:
    from .builder import build, join_negatives

    name = command_of(arguments)
    command = load(name) if name else None
    parser = build_parser(name, command)
    try:
        given = vars(parser.parse_args(join_negatives(arguments)))
    except SystemExit as stop:  # --help, --version, or an error already reported
        return int(stop.code or 0)
    given = {k: value for k, value in given.items() if k != "traceback" and value is not None}
    if command is None or name is None:
        parser.print_help()
        return 0
    settings = build(command, given, _replay(name), f"sidechain {name}")

    from .._memory import keep_freed_memory

    keep_freed_memory()
    status = command.run(settings, given)
    sys.stdout.flush()
    return status


def _replay(name: str) -> Any:
    def read(path: Any) -> Any:
        from ..io.run_folder import read_settings

        return read_settings(path, name)

    return read


def command_of(arguments: Sequence[str]) -> str | None:
    """Return the command that the first words name, or None."""
    words = [word for word in arguments if not word.startswith("-")]
    for count in (2, 1):
        if " ".join(words[:count]) in COMMANDS:
            return " ".join(words[:count])
    return None


def load(name: str) -> Command:
    """Import a command."""
    import importlib

    command: Command = importlib.import_module(f".{COMMANDS[name][0]}", __package__).COMMAND
    return command


def build_parser(name: str | None = None, command: Command | None = None) -> Parser:
    """Build the parser; only the command that is called has its options in it."""
    from .._version import __version__
    from .builder import Parser, add_options

    parser = Parser(
        prog="sidechain",
        description="Localize, steer and score concepts in the attention of diffusion models.",
        epilog="Start with `sidechain demo`; `sidechain COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"sidechain {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error came from, for bug reports"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    nested: dict[str, Any] = {}
    for full, (_, summary) in COMMANDS.items():
        room, _, action = full.rpartition(" ")
        if room and room not in nested:
            group = commands.add_parser(
                room, help=ROOMS[room], description=f"{ROOMS[room].capitalize()}."
            )
            nested[room] = group.add_subparsers(title="actions", metavar="ACTION", required=True)
        about = command.about if command is not None and full == name else summary
        added = (nested[room] if room else commands).add_parser(
            action, help=summary, description=about
        )
        if command is not None and full == name:
            add_options(added, command)
    return parser


def _answer(error: Exception, wanted: bool) -> int:
    """Report bad input in one line, a bug with its traceback."""
    import traceback

    from .._errors import is_bad_input
    from .builder import BAD_INPUT

    if is_bad_input(error):
        if wanted:
            traceback.print_exception(error)
        print(f"sidechain: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    traceback.print_exception(error)
    print(
        "sidechain: this is a bug; please report it with the lines above and the output of "
        "`sidechain doctor`",
        file=sys.stderr,
    )
    return BUG


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
