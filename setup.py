"""A wheel also holds what a checkout has beside the package, in kimi_nb/shipped; the rest is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SHIPPED = (
    "settings.ini",
    "constraints.txt",
    "examples/*",
    "nbs/workbench.ipynb",
    "nbs/*/*.ipynb",
    "data/tasks/*",
    "data/records/**/*",
    "data/checkpoints/**/*",
    "figures/*/*",
)


def shipped():
    """The files, relative to this folder; what a system or an editor left there is none of them."""
    found = {path.relative_to(HERE) for pattern in SHIPPED for path in HERE.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


class BuildWithShipped(build_py):
    """What an editable installation finds beside the package, a wheel finds inside."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for path in shipped():
            target = Path(self.build_lib, "kimi_nb", "shipped", path)
            self.mkpath(str(target.parent))
            self.copy_file(str(HERE / path), str(target))

    def get_source_files(self):
        return [*super().get_source_files(), *map(str, shipped())]


setup(cmdclass={"build_py": BuildWithShipped})
