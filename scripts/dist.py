"""Build what is published, and try it as a stranger installs it.

    python scripts/dist.py build     # dist/afa-….tar.gz, and of it dist/afa-….whl
    python scripts/dist.py check     # the same in a temporary folder; the wheel has every file, installs, and runs

Nothing is downloaded: setuptools of this environment builds, and the environment of the check sees the packages that are installed here.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What of the package's data each reads: configs, demo models and tokenizers, recipes, templates and calibration.json.
COMMANDS = (
    "--help",
    "inspect demo:curves demo:angles",
    "inspect --config sd15 --count 2",
    "train --recipe scenes --dry-run",
    "generate demo:ensemble --output out --steps 1 --prompt 'a red star left of a blue ring on a dotted mint background'",
    "screen demo:curves demo:angles --data scenes:4 --draws 2 --no-average --output screened",
)


def build(output: Path) -> tuple[Path, Path]:
    """Build the sdist of this checkout, and the wheel of the sdist.

    output: folder for both
    Returns their places.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        sdist = output / _built("sdist", _copied(Path(work) / "tree"), output)
        return sdist, output / _built("wheel", unpacked(sdist, Path(work)), output)


def unpacked(sdist: Path, folder: Path) -> Path:
    """Unpack an sdist; returns its only folder."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def _copied(folder: Path) -> Path:
    """Copy what is tracked: nothing that was built before, or lies about, gets into a package."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def tracked(part: str = ".") -> list[str]:
    """Return the tracked files of a part of the checkout, from its root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", part], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def _built(kind: str, folder: Path, output: Path) -> str:
    """Build an sdist or a wheel of a folder with its own backend (PEP 517); returns the file's name."""
    script = f"import sys\nfrom setuptools import build_meta\nprint(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(output)], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"the {kind} could not be built:\n{done.stdout}{done.stderr}")
    return done.stdout.splitlines()[-1]


def differences(wheel: Path, files: Iterable[str], root: Path = ROOT) -> list[str]:
    """Return what a wheel lacks or has otherwise than the checkout, and what else it has.

    files: of the package, from the checkout's root
    """
    wanted = set(files)
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        other = [name for name in sorted(wanted & inside) if archive.read(name) != (root / name).read_bytes()]
    return (
        [f"{name} is missing" for name in sorted(wanted - inside)]
        + [f"{name} is another file than in the checkout" for name in other]
        + [f"{name} is not in the checkout" for name in sorted(inside - wanted)]
    )


def clean() -> dict[str, str]:
    """Return the environment without PYTHONPATH, by which pip and the installed programs would find the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }


def installed(wheel: Path, folder: Path) -> Path:
    """Install a wheel alone into a new environment that sees the packages of this one; returns its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], env=clean(), check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        env=clean(),
        check=True,
    )
    asked = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        env=clean(),
        capture_output=True,
        text=True,
        check=True,
    )
    packages = {
        sysconfig.get_path("purelib"),
        *(place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")),
    }
    (Path(asked.stdout.strip()) / "dependencies.pth").write_text("\n".join(sorted(packages)) + "\n")
    return folder / "bin"


def check() -> list[str]:
    """Build, compare, install and run; returns what is wrong."""
    with tempfile.TemporaryDirectory() as work:
        sdist, wheel = build(Path(work) / "dist")
        direct = Path(work) / "direct"
        direct.mkdir()
        again = direct / _built("wheel", _copied(Path(work) / "again"), direct)
        print(
            f"{sdist.name} {sdist.stat().st_size / 1e6:.1f} MB, {wheel.name} {wheel.stat().st_size / 1e6:.1f} MB"
        )
        wrong = differences(wheel, tracked("afa")) + [
            f"of the wheel without the sdist: {one}" for one in differences(again, tracked("afa"))
        ]
        wrong += [
            f"the wheel of the sdist has other metadata: {name}"
            for name in _metadata(wheel) ^ _metadata(again)
        ]
        programs, empty = installed(wheel, Path(work) / "environment"), Path(work) / "empty"
        empty.mkdir()
        calls = [
            [
                str(programs / "python"),
                "-c",
                f"import afa; assert afa.__file__.startswith({str(programs.parent)!r}), afa.__file__",
            ]
        ]
        for call in [*calls, *([str(programs / "afa"), *shlex.split(arguments)] for arguments in COMMANDS)]:
            done = subprocess.run(call, cwd=empty, env=clean(), capture_output=True, text=True)
            print(f"{done.returncode}  {' '.join([Path(call[0]).name, *call[1:]])[:120]}", flush=True)
            if done.returncode:
                wrong.append(f"{call}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        return wrong


def _metadata(wheel: Path) -> set[tuple[str, bytes]]:
    """Return the files of a wheel's own folder, without the list of hashes."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            (name, archive.read(name))
            for name in archive.namelist()
            if ".dist-info/" in name and not name.endswith("/RECORD")
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["build", "check"])
    if parser.parse_args().what == "build":
        print(*build(ROOT / "dist"), sep="\n")
    elif wrong := check():
        sys.exit("\n".join(wrong))
    else:
        print("the wheel is complete, installs and runs")


if __name__ == "__main__":
    main()
