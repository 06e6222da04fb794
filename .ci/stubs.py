"""Build hook: an installed minisess is as typed as the copied file.

PEP 561 has no py.typed for a single module, only for packages; so the wheel has the module a second time, as its stub.
(From a temporary copy: of a source that is listed twice only one gets in.)
"""

import shutil
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Stubs(BuildHookInterface):
    def initialize(self, version, build_data):
        self.folder = tempfile.TemporaryDirectory()
        stub = shutil.copy(Path(self.root, "minisess.py"), Path(self.folder.name, "__init__.pyi"))
        build_data["force_include"][str(stub)] = "minisess-stubs/__init__.pyi"

    def finalize(self, version, build_data, artifact_path):
        self.folder.cleanup()
