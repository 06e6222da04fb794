"""Whoever reads minisess.py scrolls one way: every name is defined above its use, function bodies included."""

import dis
import sys


def forward_references(source):
    """(line, name) of what is read above its definition at module level, inside bodies, too."""
    # Without what only type checkers read.
    source = source.replace("if TYPE_CHECKING:", "if 0:").replace("if not TYPE_CHECKING:", "if 1:")
    codes, defined, reads = [compile(source, "module", "exec")], {}, []
    for code in codes:
        codes += [nested for nested in code.co_consts if hasattr(nested, "co_code")]
        starts, line, own = dict(dis.findlinestarts(code)), 0, defined if code is codes[0] else {}
        for step in dis.get_instructions(code):
            line = starts.get(step.offset) or line
            if step.opname == "STORE_NAME":
                own.setdefault(step.argval, line)
            elif step.opname in ("LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"):
                reads += [(line, step.argval)] if own is defined or step.argval not in own else []
    return sorted({(line, name) for line, name in reads if line < defined.get(name, 0)})


EXAMPLE = "def early(x, late=2): return [unseen for unseen in LATE]\nclass Late:\n def own(self): return Late\nLATE = 1"
assert forward_references(EXAMPLE) == [(1, "LATE")]  # so it sees one
with open("minisess.py", encoding="utf-8") as file:
    found = forward_references(file.read())
sys.exit("\n".join(f"line {line} uses {name}, which is defined further down" for line, name in found) or 0)
