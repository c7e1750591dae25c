"""The command `cascade-rt`.

A command is a module with SUMMARY, EXAMPLE, `add_arguments` and `run`. Those of the runtime are here; other
distributions, and our own offline stage, register theirs as entry points of the group `cascade_rt.commands`.

Answers go to standard output, progress and errors to standard error. Exit status: 0 on success, 2 on an error that
is reported in one line, 1 when the reader of standard output closes it, 130 when interrupted, 128 plus the number of
another signal that ended it.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points

from .. import __version__
from ..errors import CascadeError, InputError, first_line
from .parser import Command, CommandParser
from .rendering import printable
from .signals import Termination, termination

BUILT_IN = ("predict", "serve", "info", "evaluate", "tune", "benchmark", "push")
GROUP = "cascade_rt.commands"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # labels and texts are Unicode, whatever the terminal's encoding
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    names: Mapping[str, str] = {}
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
        elif argv[0] == "--version":
            print(f"cascade-rt {__version__}")
        else:
            command = find_command(argv[0])
            parser = CommandParser(argv[0], command)
            names = parser.option_names()
            options = parser.parse_args(argv[1:])
            with termination():
                command.run(options)
    except CascadeError as error:
        return _complain(error.spelled(names))
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _complain(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130
    except Termination as stopped:
        return stopped.status
    return 0


def find_command(name: str) -> Command:
    """Return a command by name; raise InputError, with the nearest name, if there is none."""
    if name in BUILT_IN:  # without a look at the installed distributions, which takes time
        return importlib.import_module(f"{__name__}.{name}")
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name in found:
        try:
            command: Command = found[name].load()
        except Exception as error:  # another distribution's code
            raise CascadeError(f"the command {name!r} cannot be loaded ({first_line(error)})") from error
        return command
    close = get_close_matches(name, [*BUILT_IN, *found], n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of: {', '.join([*BUILT_IN, *sorted(found)])}"
    raise InputError(f"found no command {name!r}; {hint}")


def _overview() -> str:
    names = [*BUILT_IN, *sorted(point.name for point in entry_points(group=GROUP))]
    lines = [f"cascade-rt {__version__}: text classification with a cascade of BERTs, small to big", ""]
    lines += ["usage: cascade-rt COMMAND [OPTIONS]", "", "commands:"]
    for name in dict.fromkeys(names):
        try:
            command = find_command(name)
            lines += [f"  {name:<12}{command.SUMMARY}", f"  {'':<12}  {command.EXAMPLE}"]
        except CascadeError as error:
            lines.append(f"  {name:<12}{error}")
    return "\n".join([*lines, "", "cascade-rt COMMAND --help shows the options of a command."])


def _complain(message: str) -> int:
    print("cascade-rt: error: " + printable(" ".join(message.split())), file=sys.stderr)
    return 2
