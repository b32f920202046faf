"""A folder called `quantizers` beside the user's script."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = "import pt2e_quant, quantizers.xnnpack; print(quantizers.xnnpack.__name__)"


@pytest.mark.parametrize(("file", "works"), [("__init__.py", False), ("notes.txt", True)])
def test_a_package_that_hides_ours_is_named_and_a_plain_folder_hides_nothing(tmp_path, file, works):
    folder = tmp_path / "quantizers"
    folder.mkdir()
    (folder / file).touch()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # -S: without the finder that an editable install has of its own, which finds our modules all the same
    command, paths = [sys.executable, "-S", str(script)], (str(ROOT), sysconfig.get_path("purelib"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == works
    if not works:
        assert f"but Python takes {folder} for the package 'quantizers', which hides it" in done.stderr
