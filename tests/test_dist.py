"""What is published has every file of the checkout; `make check-dist` builds, installs and runs it."""

import sys
import zipfile
from pathlib import Path

import afa

ROOT = Path(afa.__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import dist  # noqa: E402


def test_a_wheel_that_lacks_changes_or_adds_a_file_is_found_out(tmp_path):
    (tmp_path / "afa").mkdir()
    for name in ("same.py", "other.json", "lost.toml"):
        (tmp_path / "afa" / name).write_text(name)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("afa/same.py", "same.py")
        wheel.writestr("afa/other.json", "{}")
        wheel.writestr("afa/stale.py", "")
        wheel.writestr("afa-0.1.0.dist-info/METADATA", "")
    files = ["afa/same.py", "afa/other.json", "afa/lost.toml"]
    found = ["afa/lost.toml is missing", "afa/other.json is another file than in the checkout", "afa/stale.py is not in the checkout"]
    assert dist.differences(tmp_path / "a.whl", files, tmp_path) == found


def test_every_file_of_the_package_is_taken_by_a_pattern():
    """Without building: what is no module is named by package-data."""
    import tomllib

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    taken = {path for package, globs in patterns.items() for glob in globs for path in (ROOT / package.replace(".", "/")).glob(glob.replace("**", "**/*"))}
    data = [path for path in (ROOT / "afa").rglob("*") if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts]
    assert len(data) > 50 and [str(path) for path in data if path not in taken] == []
