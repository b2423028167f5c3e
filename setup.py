"""The native build: g++ and nvcc driven through ninja. Metadata lies in pyproject.toml. Never imports torch.

R1V2_FAST_CUDA   auto (default): with CUDA where nvcc is found; 1: CUDA or an error; 0: the CPU half alone
R1V2_FAST_ARCHS  architectures, default "80 90a 100 120"; the last one also as PTX, for cards to come
CUDA_HOME, CXX   where to find nvcc and the C++ compiler, before the PATH
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = ["80", "90a", "100", "120"]
NVCC_HINT = "install the CUDA toolkit 12.8 or newer and set CUDA_HOME, or build the CPU half with R1V2_FAST_CUDA=0"


def nvcc() -> str | None:
    """The nvcc to use, or None; raises where CUDA was asked for and there is none."""
    wish = os.environ.get("R1V2_FAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"R1V2_FAST_CUDA must be auto, 1 or 0, got {wish!r}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    works = found and subprocess.run([found, "--version"], capture_output=True).returncode == 0
    if works:
        return found
    if wish == "1":
        raise SystemExit(
            f"R1V2_FAST_CUDA=1, but nvcc {'does not run: ' + found if found else 'was not found'}; {NVCC_HINT}"
        )
    print("r1v2_fast: nvcc not found, building the CPU half of _C")
    return None


def architectures(nvcc: str) -> list[str]:
    """Those asked for; of the default ones, those this nvcc knows."""
    if (wish := os.environ.get("R1V2_FAST_ARCHS")) is not None:
        archs = wish.replace(",", " ").split()
        if not archs or not all(arch.rstrip("af").isdigit() for arch in archs):
            raise SystemExit(f"R1V2_FAST_ARCHS must list architectures such as '80 90a', got {archs}")
        return archs
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [arch for arch in DEFAULT_ARCHS if f"compute_{arch.rstrip('a')}" in listed]
    if len(known) < len(DEFAULT_ARCHS):
        if not known and os.environ.get("R1V2_FAST_CUDA") == "1":
            raise SystemExit(f"R1V2_FAST_CUDA=1, but {nvcc} knows none of {DEFAULT_ARCHS}; {NVCC_HINT}")
        print(f"r1v2_fast: this nvcc knows {known or 'none'} of {DEFAULT_ARCHS}; a newer one covers more cards")
    return known


class NinjaBuild(build_ext):
    """Writes build.ninja and runs ninja, which compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        headers = sysconfig.get_path("include")
        if compiler is None or not Path(headers, "Python.h").is_file():
            if os.environ.get("R1V2_FAST_CUDA") == "1":
                raise SystemExit("R1V2_FAST_CUDA=1 needs a C++17 compiler and Python's headers (python3-dev)")
            print("r1v2_fast: no C++ compiler or no Python.h: going on without _C, on PyTorch and Triton alone")
            return
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}"  # kept between builds, unlike build_temp
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / Path(self.get_ext_filename(ext.name)).name
        (folder / "build.ninja").write_text(self.rules(compiler, headers, nvcc(), library))
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        subprocess.run([ninja, "-C", folder] if ninja else [sys.executable, "-m", "ninja", "-C", folder], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)

    @staticmethod
    def rules(compiler: str, headers: str, cuda: str | None, library: Path) -> str:
        import pybind11

        names = architectures(cuda) if cuda else []
        cuda = cuda if names else None
        host = "-fPIC -fvisibility=hidden -Wall"
        common = f"-O3 -std=c++17 -isystem {headers} -isystem {pybind11.get_include()}"
        common += f" -DR1V2_FAST_ARCHITECTURES='\"{' '.join(names)}\"'"
        static = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
        if cuda:  # nvcc drives the whole build: it knows where its headers and the static cudart lie
            code = [f"-gencode arch=compute_{n},code=sm_{n}" for n in names]
            code.append(f"-gencode arch=compute_{names[-1]},code=compute_{names[-1]}")
            driver = f"{cuda} -ccbin {compiler}"
            compile_ = f"{driver} {common} -DR1V2_FAST_CUDA -lineinfo {' '.join(code)} -Xcompiler '{host}'"
            link = f"{driver} -shared {' '.join(code)} -cudart static $in -o $out " + " ".join(
                f"-Xcompiler '\"{f}\"'" for f in static
            )
        else:
            compile_ = f"{compiler} {common} {host}"
            link = f"{compiler} -shared $in -o $out {' '.join(static)}"
        lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            f"  command = {compile_} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            f"  command = {link}",
            "  description = link $out",
        ]
        objects = []
        for source in sorted([*ROOT.glob("csrc/*.cpp"), *(ROOT.glob("csrc/*.cu") if cuda else ())]):
            objects.append(f"{source.name}.o")
            lines.append(f"build {objects[-1]}: compile {source}")
        lines.append(f"build {library.name}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


setup(ext_modules=[Extension("r1v2_fast._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
