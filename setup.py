"""The build step that pyproject.toml cannot state: the wheel carries recipes/*.yaml as hapo_lite/recipes/."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the recipes into the package, where `hapo-train tiny_cpu` finds them without a checkout."""

    def run(self) -> None:
        super().run()
        # An editable install reads the recipes where they are.
        if self.editable_mode:
            return
        folder = Path(self.build_lib, "hapo_lite", "recipes")
        self.mkpath(str(folder))
        for recipe in sorted(Path("recipes").glob("*.yaml")):
            self.copy_file(str(recipe), str(folder / recipe.name))


setup(cmdclass={"build_py": BuildWithRecipes})
