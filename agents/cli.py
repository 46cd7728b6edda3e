"""The ``worldgym`` command: one subcommand per dataclass of ``worldgym.agents.commands``."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence

from worldgym.errors import CommandError, WorldGymError

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's thread pool collapses on a shared box
BOX = re.compile("[\u2500-\u257f]+")


def parse(argv: Sequence[str] | None = None) -> object:
    """The command that ``argv`` names, as an object with ``run()``.

    Raises:
        CommandError: the arguments make no sense; help and version leave through SystemExit.
    """
    try:
        import tyro
    except ImportError as error:
        raise CommandError("the worldgym command needs tyro", given=str(error), expected="tyro",
                           fix="pip install 'worldgym[rl]'") from error
    from worldgym.agents import commands

    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["inspect"] and len(args) == 2 and not args[1].startswith("-"):
        args.insert(1, "--path")  # `worldgym inspect FOLDER`
    if args[:1] == ["bench"] and len(args) > 1 and not args[1].startswith("-"):
        args.insert(1, "--world")  # `worldgym bench scope`
    args = together(args, _lists(commands.COMMANDS.get(args[0])) if args else ())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands.COMMANDS, prog="worldgym", description=commands.DESCRIPTION,
                args=args)
    except SystemExit as stop:
        if not stop.code:
            raise
    text = " ".join(BOX.sub(" ", said.getvalue()).split())
    text = re.sub(r"(For full helptext|Perhaps you meant).*$", "", text).strip() or "no arguments"
    raise CommandError("the command line makes no sense", given=text,
                       expected=f"worldgym {{{','.join(commands.COMMANDS)}}} with its options",
                       fix="worldgym COMMAND --help shows every option")


def _lists(command: object) -> tuple[str, ...]:
    """Options of a command that take any number of values."""
    kinds = getattr(command, "__annotations__", {})
    return tuple("--" + name.replace("_", "-") for name, kind in kinds.items()
                 if str(kind).startswith("tuple[") and "..." in str(kind))


def together(args: Sequence[str], lists: Sequence[str]) -> list[str]:
    """``args`` with the values of an option that is given several times in one place.

    argparse would keep the last ones only, without a word.

    >>> together(["x", "--policy", "a", "--seed", "1", "--policy", "b", "c"], ["--policy"])
    ['x', '--policy', 'a', 'b', 'c', '--seed', '1']
    """
    groups: list[list[str]] = [[]]
    places: dict[str, list[str]] = {}
    for arg in args:
        name, equals, value = arg.partition("=") if arg.startswith("--") else (arg, "", "")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name in lists:
            if name not in places:
                places[name] = [name]
                groups.append(places[name])
            groups.append(places[name])  # where values go until the next option
            places[name] += [value] if equals else []
        elif arg.startswith("--"):
            groups.append([arg])
        else:
            groups[-1].append(arg)
    seen: list[int] = []
    out: list[str] = []
    for group in groups:
        if id(group) not in seen:
            seen.append(id(group))
            out += group
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a named error becomes one paragraph and exit code 2."""
    try:
        command = parse(argv)
        command.run()  # type: ignore[attr-defined]
        return 0
    except WorldGymError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"CommandError: a file or folder cannot be used: got {error}; expected a path that "
              "can be read and written. Fix: check the path and its permissions", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from its last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
