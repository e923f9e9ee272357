"""The program `lora-core`: a file a command in lora_core/commands, imported only when it is called."""

import importlib
import sys

from lora_core.errors import LoraCoreError

# the module lora_core.commands.<name> holds a function of the same name
COMMANDS = ("demo", "doctor", "memory", "inspect", "bench")

USAGE_ERROR = 2


def main(arguments: list[str] | None = None) -> None:
    """Run `lora-core`; bad input ends with one line on standard error and exit status 2."""
    import typer

    arguments = sys.argv[1:] if arguments is None else arguments
    app = typer.Typer(
        name="lora-core",
        help="LoRA and QLoRA from scratch: try it, check it, plan with it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def _root() -> None:
        """Makes `lora-core COMMAND` the form even when a single command is loaded."""

    wanted = [name for name in COMMANDS if name in arguments[:1]] or COMMANDS
    for name in wanted:
        app.command(name)(getattr(importlib.import_module(f"lora_core.commands.{name}"), name))
    try:
        app(args=arguments, prog_name="lora-core")
    except SystemExit as done:
        # a command that ends well is no reason to end the caller
        if done.code:
            raise
    except LoraCoreError as error:
        sys.stderr.write(f"lora-core: {type(error).__name__}: {error}\n")
        sys.exit(USAGE_ERROR)
