"""Finds the recipes: a user's own, and those that come with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from megatron_sgopd.config.errors import ConfigError

# In a checkout a link to `recipes/`; a wheel carries the files themselves.
RECIPES = (Path(__file__).resolve().parents[1] / "recipes").resolve()


def find_recipe(recipe: str | Path) -> Path:
    """Returns the path of a recipe; `recipes/…` is looked for in the package, too.

    Raises:
        ConfigError: there is no such file, with the name of a similar one.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    if path.parts[:1] == ("recipes",) and (shipped := RECIPES.joinpath(*path.parts[1:])).is_file():
        return shipped
    names = {p.stem: Path("recipes", p.relative_to(RECIPES)) for p in RECIPES.rglob("*.yaml")}
    near = difflib.get_close_matches(path.stem, names, 1, 0.5)
    hint = f"; did you mean {names[near[0]]}?" if near else ""
    raise ConfigError(f"recipe {path} does not exist{hint}")
