"""`sgopd config RECIPE [key=value …]`: the recipe as the trainer will read it."""

from __future__ import annotations

import argparse

from megatron_sgopd.cli.common import Commands, add_command, add_recipe
from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.load import load_config, to_yaml


def add(commands: Commands) -> None:
    text = "print a recipe with every default and override resolved"
    add_recipe(add_command(commands, "config", show_config, text))


def show_config(arguments: argparse.Namespace) -> int:
    print(to_yaml(resolve(load_config(arguments.recipe, arguments.overrides))), end="")
    return 0
