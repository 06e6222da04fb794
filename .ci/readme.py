"""PYTHONPATH=. python .ci/readme.py FOLDER: writes README's python blocks there, a module each, for mypy and pyright.

The first module has the blocks of README's beginning.  Each other takes the names that it uses and
doesn't make from the modules before it, or from minisess; other names are something of the reader's.
"""

import builtins
import json
import re
import sys
from pathlib import Path
from symtable import symtable

import minisess


def names(table):
    """The global names that are used in *table*, and those that are made there."""
    symbols = table.get_symbols()
    made = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()}
    used = {s.get_name() for s in symbols if s.is_global() or table.get_type() == "module"}
    return used.union(*(names(inner)[0] for inner in table.get_children())), made


folder = Path(sys.argv[1])
text = Path("README.md").read_text(encoding="utf-8")
blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S))
modules = [[block for block in blocks if block.start() < text.index("\n## ")]]
modules += [[block] for block in blocks[len(modules[0]) :]]
places = dict.fromkeys(minisess.__all__, "minisess")

for number, module in enumerate(modules):
    code = ""
    for block in module:  # on the lines where it stands in README
        code += "\n" * (text[: block.start(1)].count("\n") - code.count("\n")) + block[1]
    used, made = names(symtable(code, "README.md", "exec"))
    start = ["from typing import Any; import minisess"]
    for name in sorted(used - made - {*dir(builtins), "__name__", "__file__"}):
        if name in places:
            start.append(f"from {places[name]} import {name}")
        else:
            start.append(f"{name}: {'minisess.Session' if name == 'session' else 'Any'}")
    for name in made:
        places.setdefault(name, f"README_{number}")
    (folder / f"README_{number}.py").write_text("; ".join(start) + code, encoding="utf-8")

# README's frameworks aren't installed there.
rules = {"typeCheckingMode": "standard", "pythonVersion": "3.11", "reportMissingImports": "warning"}
(folder / "pyrightconfig.json").write_text(json.dumps(rules))
