"""The build step that pyproject.toml cannot state: the wheel carries recipes/*.yaml and docs/*.md within hapo_lite/."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPapers(build_py):
    """Copies recipes and docs into the package, so that `hapo-train tiny_cpu` and cited pages need no checkout."""

    def run(self) -> None:
        super().run()
        # An editable install reads the recipes where they are.
        if self.editable_mode:
            return
        for name, kind in (("recipes", "*.yaml"), ("docs", "*.md")):
            folder = Path(self.build_lib, "hapo_lite", name)
            self.mkpath(str(folder))
            for file in sorted(Path(name).glob(kind)):
                self.copy_file(str(file), str(folder / file.name))


setup(cmdclass={"build_py": BuildWithPapers})
