"""docs/notebook.ipynb, executed in an empty folder by the project that is installed.

python -m tests.docs.notebook        executes it again and stores what it prints and draws
"""

import copy
import os
import pathlib
import re
import tempfile
from typing import Any

import nbclient
import nbformat

NOTEBOOK = pathlib.Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"
_NUMBER = re.compile(r"\d[\d,.]*(e[+-]\d+)?")


def stored() -> Any:
    """The notebook with its outputs."""
    return nbformat.read(NOTEBOOK, as_version=4)


def executed(folder: str | pathlib.Path, notebook: Any) -> Any:
    """A notebook with the outputs of an execution in a folder: what is printed and drawn, no progress bars.

    Raises:
      nbclient.exceptions.CellExecutionError: of a cell.
    """
    again = copy.deepcopy(notebook)
    for cell in again.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count, cell.metadata = [], None, {}
    client = nbclient.NotebookClient(
        again, timeout=300, resources={"metadata": {"path": str(folder)}}, record_timing=False
    )
    # The devices that tests simulate would cost half of the time.
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = " ".join(flag for flag in flags if "device_count" not in flag)
    client.execute(env={**os.environ, "XLA_FLAGS": kept})
    for cell in again.cells:
        if cell.cell_type == "code":
            cell.outputs = _without_bars(cell.outputs)
    return again


def _without_bars(outputs: list[Any]) -> list[Any]:
    """Outputs without progress bars and warnings; what is printed between two of them is one text."""
    kept: list[Any] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if kept and output.get("name") == kept[-1].get("name") == "stdout":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def shapes(notebook: Any) -> list[list[str]]:
    """What each code cell prints and draws, with every number as #: times and last digits differ."""
    return [
        [_shape(output) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def _shape(output: Any) -> str:
    """One output without its numbers; of a picture which elements it has."""
    if output.output_type == "stream":
        return _NUMBER.sub("#", output.text)
    picture = output.get("data", {}).get("image/svg+xml", "")
    return " ".join(sorted(set(re.findall(r"<(\w+)", picture))))


def main() -> None:
    """Executes the notebook and writes it."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(folder, stored())
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, NOTEBOOK)
    print(f"written to {NOTEBOOK}")


if __name__ == "__main__":
    main()
