"""The program `lora-core`: a file a command in lora_core/commands, imported only when it is called."""

import importlib
import io
import os
import sys
from typing import Any

from lora_core.errors import LoraCoreError
from lora_core.terminal import INTERRUPTED, printable

# the module lora_core.commands.<name> holds a function of the same name
COMMANDS = ("demo", "doctor", "memory", "inspect", "bench", "puzzles")

FAILED, USAGE_ERROR = 1, 2


def main(arguments: list[str] | None = None) -> None:
    """Run `lora-core`; bad input ends with one line on standard error and exit status 2."""
    _escape_what_output_lacks()
    try:
        _run(_app(sys.argv[1:] if arguments is None else arguments), arguments)
    except KeyboardInterrupt:
        _stop("interrupted", INTERRUPTED)
    except LoraCoreError as error:
        _stop(f"{type(error).__name__}: {error}", USAGE_ERROR)
    except OSError as error:
        _give_up_output()
        _stop(f"{(error.strerror or str(error)).lower()}{f': {error.filename}' if error.filename else ''}", FAILED)


def _escape_what_output_lacks() -> None:
    """Have characters that the output's encoding lacks escaped, as on standard error, instead of ending the program."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Drop what a full or closed output did not take: at exit Python would try again, with a traceback."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(message: str, status: int) -> None:
    told = "\n".join(printable(line) for line in message.splitlines())
    sys.stderr.write(f"lora-core: {told}\n")
    sys.exit(status)


def _app(arguments: list[str]) -> Any:
    import typer

    app = typer.Typer(
        name="lora-core",
        help="LoRA and QLoRA from scratch: try it, check it, plan with it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            from lora_core import __version__

            typer.echo(f"lora-core {__version__}")
            raise typer.Exit

    # a root makes `lora-core COMMAND` the form even when a single command is loaded
    @app.callback()
    def _root(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Show the version."
        ),
    ) -> None:
        pass

    wanted = [name for name in COMMANDS if name in arguments[:1]] or COMMANDS
    for name in wanted:
        command = importlib.import_module(f"lora_core.commands.{name}")
        app.command(name, context_settings=getattr(command, "SETTINGS", None))(getattr(command, name))
    return app


def _run(app: Any, arguments: list[str] | None) -> None:
    try:
        app(args=arguments, prog_name="lora-core")
    except SystemExit as done:
        # a command that ends well is no reason to end the caller
        if done.code:
            raise
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
