"""README.md is nbs/index.ipynb, executed and turned to Markdown: `python docs/readme.py [OUTPUT]`."""

import argparse
import re
import tomllib
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor, TagRemovePreprocessor

REPO = Path(__file__).resolve().parents[1]


def relink(text: str) -> str:
    """Links from the top folder: `../figures/x.png` -> `figures/x.png`, `howto/x.ipynb` -> `nbs/howto/x.ipynb`."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # code stays as it is
    parts[::2] = [re.sub(r"\]\((?!https?:|\.\./|#)", "](nbs/", part).replace("](../", "](") for part in parts[::2]]
    return "".join(parts)


WORKBENCH = "results/lab/workbench.ipynb"  # where .binder/postBuild lays it out


def badges(project: dict) -> str:
    """A line of pictures that lead somewhere; those that need the repository's address, where pyproject.toml has it.

    `../../` in a README leads from the branch to the repository's own pages, whatever the repository is called.
    """
    shield = "https://img.shields.io/badge"
    shown = [
        "[![CI](../../actions/workflows/ci.yml/badge.svg)](../../actions/workflows/ci.yml)",
        f"![Python 3.11 to 3.13]({shield}/python-3.11_to_3.13-blue)",
        f"[![MIT licence]({shield}/licence-MIT-green)](LICENSE)",
        f"[![Paper and slides]({shield}/paper-slides-orange)](../../releases/latest)",
    ]
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", project.get("urls", {}).get("Repository", ""))
    if found:
        binder = f"https://mybinder.org/v2/gh/{found[1]}/HEAD?urlpath=lab/tree/{WORKBENCH}"
        colab = f"https://colab.research.google.com/github/{found[1]}/blob/main/examples/colab.ipynb"
        shown.append(f"[![Binder](https://mybinder.org/badge_logo.svg)]({binder})")
        shown.append(f"[![Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})")
    return " ".join(shown)


def readme(path: Path = REPO / "nbs" / "index.ipynb") -> str:
    """The Markdown: outputs computed now, the code of cells tagged `remove-input` left out."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    quiet = ["--IPKernelApp.log_level=ERROR"]
    notebook, resources = ExecutePreprocessor(kernel_name="python3", timeout=120, extra_arguments=quiet).preprocess(
        notebook, resources
    )
    notebook, resources = TagRemovePreprocessor(enabled=True, remove_input_tags={"remove-input"}).preprocess(
        notebook, resources
    )
    text, _ = MarkdownExporter().from_notebook_node(notebook, resources)
    text = re.sub(r"\n{3,}", "\n\n", relink(text)).strip() + "\n"
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return text.replace("\n\n> ", f"\n{badges(project)}\n> ", 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=REPO / "README.md")
    parser.parse_args().output.write_text(readme(), encoding="utf-8")
