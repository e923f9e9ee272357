"""The program `lora-core`: one command a file in lora_core/commands, each loaded only when it is called."""

import importlib
import sys

import click
from typer.core import TyperGroup
from typer.main import Typer, get_command

from lora_core.errors import LoraCoreError

# command -> its one-line help; the module lora_core.commands.<command> holds `app`, a Typer of one command
COMMANDS: dict[str, str] = {}


class _LazyGroup(TyperGroup):
    """A group that imports a command's module when the command is run, so that --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return get_command(importlib.import_module(f"lora_core.commands.{cmd_name}").app)
