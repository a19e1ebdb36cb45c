"""README.md is nbs/index.ipynb, executed and turned to Markdown: `python docs/readme.py [OUTPUT]`."""

import re
import sys
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
    return re.sub(r"\n{3,}", "\n\n", relink(text)).strip() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else REPO / "README.md").write_text(readme(), encoding="utf-8")
