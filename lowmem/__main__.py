"""The command line: `python -m lowmem COMMAND`; one module of `lowmem.cli` per command.

With `--json` standard output is the receipt as one line of JSON and nothing else. Progress goes to standard error,
and only when that is a terminal. Exit status: 0, 1 when `verify` finds a claim that does not hold, 2 for wrong usage, 3
for a `LowMemError`, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lowmem.cli import compare, export, generate, longctx, offload, plan, quantize, serve, verify
from lowmem.cli.arguments import current_names
from lowmem.errors import LESS_MEMORY, LowMemError, file_error, is_out_of_memory
from lowmem.machine.budget import UNLIMITED
from lowmem.machine.cap import cap_memory

COMMANDS = (plan, generate, quantize, compare, offload, export, longctx, verify, serve)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="lowmem", description="Language models within a memory budget.")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(current_names(sys.argv[1:] if arguments is None else arguments))
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except LowMemError as error:
        print(*filter(None, (error.message, error.hint)), sep="\n", file=sys.stderr)
        return 3
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does; Python's flush at exit must not fail too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if is_out_of_memory(error):
            print("Memory ran out.", LESS_MEMORY, sep="\n", file=sys.stderr)
        elif isinstance(error, OSError):
            refused = file_error(error, "The command was not finished")
            print(refused.message, refused.hint, sep="\n", file=sys.stderr)
        else:
            raise
        return 3
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    finally:
        cap_memory(UNLIMITED)  # a command may have capped the process it runs in


if __name__ == "__main__":
    sys.exit(main())
