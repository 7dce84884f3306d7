"""The API reference, from docstrings: `python examples/reference.py build/reference`, then open its index.html.

Made by pdoc, in a folder that is nobody's to commit. `make reference` does the same.
"""

import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import hopeprobe


def main(folder):
    """Write the pages."""
    import pdoc

    # Names that are imported for type checkers alone are shown as they are written.
    warnings.filterwarnings("ignore", "Error parsing type annotation", UserWarning)
    for name in hopeprobe.__all__:  # they load when first used, and pdoc looks at what is loaded
        setattr(hopeprobe, name, getattr(hopeprobe, name))
    pdoc.render.configure(docformat="google", show_source=False, search=True)
    packages = [
        hopeprobe,
        importlib.import_module("hopeprobe.model"),
        importlib.import_module("hopeprobe.cli"),
    ]
    names = [package.__name__ for package in packages]
    known = set(pdoc.extract.walk_specs(names))
    # A package that says what it exports hides its modules, and a probe's definitions are in its module.
    for package in packages:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name not in known and "._" not in found.name:
                names.append(found.name)
                known |= set(pdoc.extract.walk_specs([found.name]))
    pdoc.pdoc(*names, output_directory=Path(folder))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "build/reference")
