"""The native build: g++ and nvcc driven through ninja. Metadata lies in pyproject.toml. Never imports torch.

R1V2_FAST_CUDA   auto (default): with CUDA where nvcc is found; 1: CUDA or an error; 0: the CPU half alone
R1V2_FAST_ARCHS  architectures, default "80 90a 100 120"; the last one also as PTX, for cards to come
CUDA_HOME        where to find nvcc, before the PATH
CXX              the C++ compiler, with a launcher and flags if need be: 'ccache g++ -march=native'
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / "native"  # kept between builds, for all interpreters
CSRC = "../../csrc"  # from there
ARCHITECTURES = ["80", "90a", "100", "120"]
OLDEST_NVCC = (12, 0)
WHAT_WORKS = "install the CUDA toolkit 12.8 or newer and set CUDA_HOME, or build the CPU half with R1V2_FAST_CUDA=0"

COMMON = "-O3 -DNDEBUG -std=c++17"
# No contraction: a race key must have the same bits on every machine, and a fused multiply-add rounds once, not twice.
# -fno-trapping-math lets loops with comparisons become vector code: nobody looks at the flags of exceptions.
HOST = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-pthread", "-Wall"]
DEVICE = "-lineinfo -Xfatbin -compress-all"  # by itself fatbinary leaves code with line numbers as it is
EXTRA = {"priority_*.cu": "-fmad=false"}  # what -ffp-contract=off is to the host
BINDINGS = ["module.cpp", "*_bind.cpp"]  # include Python's headers; the rest is compiled once for all interpreters
LINK = ["-static-libstdc++", "-static-libgcc", "-pthread"]
# -fvisibility=hidden leaves libstdc++'s templates visible; unused parts of it want a newer glibc than those in use
LINKER = [f"--version-script={CSRC}/exports.map", "--gc-sections"]


class Lacking(Exception):
    """Why there can be no CUDA half."""


class Cuda(NamedTuple):
    nvcc: str
    version: str
    architectures: list[str]


def extra_flags(source: Path) -> str:
    return " ".join(flags for pattern, flags in EXTRA.items() if fnmatch(source.name, pattern))


def is_binding(source: Path) -> bool:
    return any(fnmatch(source.name, pattern) for pattern in BINDINGS)


def gencode(architectures: list[str]) -> str:
    """Machine code for each, and PTX of the last without its suffix: a later card can't take what `90a` alone has."""
    last = architectures[-1].rstrip("af")
    codes = [f"arch=compute_{name},code=sm_{name}" for name in architectures]
    return " ".join(f"-gencode {code}" for code in [*codes, f"arch=compute_{last},code=compute_{last}"])


@functools.cache
def cuda() -> Cuda | None:
    """What compiles the CUDA half, or None; stops where it was asked for and can't be had."""
    wish = os.environ.get("R1V2_FAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"R1V2_FAST_CUDA must be auto, 1 or 0, got {wish!r}")
    if wish == "0":
        return None
    try:
        nvcc, version = find_nvcc()
        return Cuda(nvcc, version, choose_architectures(nvcc, version, insist=wish == "1"))
    except Lacking as lack:
        if wish == "1":
            raise SystemExit(f"R1V2_FAST_CUDA=1, but {lack}; {WHAT_WORKS}") from None
        print(f"r1v2_fast: {lack}; building the CPU half of _C")
        return None


def find_nvcc() -> tuple[str, str]:
    home = os.environ.get("CUDA_HOME")
    path = f"{home}/bin" if home else f"{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin"
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        raise Lacking(f"nvcc was not found {f'in CUDA_HOME={home}' if home else 'on the PATH or in /usr/local/cuda'}")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    version = re.search(r"\bV(\d+\.\d+\.\d+)", said.stdout)
    if said.returncode or version is None:
        raise Lacking(f"{nvcc} does not run: `nvcc --version` gave {(said.stderr or said.stdout).strip()!r}")
    if tuple(map(int, version[1].split(".")[:2])) < OLDEST_NVCC:
        raise Lacking(f"{nvcc} is {version[1]}, older than {'.'.join(map(str, OLDEST_NVCC))}")
    return nvcc, version[1]


def choose_architectures(nvcc: str, version: str, *, insist: bool) -> list[str]:
    """Those asked for; else the default ones, without `insist` those of them that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    wish = os.environ.get("R1V2_FAST_ARCHS")
    names = ARCHITECTURES if wish is None else wish.replace(",", " ").split()
    if not names or not all(re.fullmatch(r"\d{2,3}[af]?", name) for name in names):
        raise SystemExit(f"R1V2_FAST_ARCHS must list architectures such as '80 90a', got {wish!r}")
    known = [name for name in names if f"compute_{name.rstrip('af')}" in listed]
    if known == names:
        return names
    lack = f"nvcc {version} knows {known or 'none'} of the architectures {names}"
    if wish is not None:
        raise SystemExit(f"R1V2_FAST_ARCHS={wish!r}, but {lack}; {nvcc} knows {' '.join(listed)}")
    if insist or not known:
        raise Lacking(f"{lack}, which R1V2_FAST_ARCHS sets")
    print(f"r1v2_fast: {lack}; going on with those, and PTX for newer cards")
    return known


class Build(build):
    """Stops before it copies the package where it can't have what was asked for: pip shows all that was printed."""

    def run(self) -> None:
        cuda()
        shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier build left there would be shipped
        super().run()


class NinjaBuild(build_ext):
    """Writes a ninja file and runs ninja, which compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("CXX") or "g++"
        cxx = Cxx.of(wanted)
        python = sysconfig.get_path("include")
        if cxx is None or not Path(python, "Python.h").is_file():
            lack = f"no C++ compiler ({wanted})" if cxx is None else f"no Python.h in {python} (python3-dev)"
            if os.environ.get("R1V2_FAST_CUDA") == "1":
                raise SystemExit(f"R1V2_FAST_CUDA=1 needs a C++17 compiler and Python's headers; there is {lack}")
            print(f"r1v2_fast: {lack}: going on without _C, on PyTorch and Triton alone")
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # an earlier build's
            return
        library = BUILD / Path(self.get_ext_filename(ext.name)).name
        text = ninja_file(cxx, python, cuda(), library)
        # the interpreter's own before one on the PATH: another release of ninja would not read the log, and compile all again
        ours = importlib.util.find_spec("ninja") is not None
        command = [sys.executable, "-m", "ninja"] if ours else [shutil.which("ninja") or "ninja"]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        BUILD.mkdir(parents=True, exist_ok=True)
        with (BUILD / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ninja itself has no lock
            (BUILD / f"{library.stem}.ninja").write_text(text)
            if subprocess.run(
                [*command, "-C", BUILD, "-f", f"{library.stem}.ninja"], pass_fds=[lock.fileno()]
            ).returncode:
                ways = "; CXX names another compiler, R1V2_FAST_CUDA=0 leaves CUDA out" if cuda() else ""
                raise SystemExit(f"r1v2_fast: _C did not compile; the compiler's message is above{ways}")
            fresh = target.with_suffix(".new")
            shutil.copyfile(library, fresh)
            fresh.replace(target)  # a process that runs the old one keeps it


class Cxx(NamedTuple):
    """What CXX names."""

    launcher: str  # such as ccache, with a blank behind it
    compiler: str
    flags: list[str]

    @classmethod
    def of(cls, wanted: str) -> Cxx | None:
        """None where a part of it can't be found."""
        words = shlex.split(wanted)
        first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        found = [shutil.which(word) for word in words[:first_flag]]
        programs = [shlex.quote(path) for path in found if path]
        if not found or len(programs) < len(found):
            return None
        flags = [shlex.quote(word) for word in words[first_flag:]]
        return cls("".join(f"{program} " for program in programs[:-1]), found[-1] or "", flags)


def ninja_file(cxx: Cxx, python: str, cuda: Cuda | None, library: Path) -> str:
    import pybind11

    release = re.search(r"\d+\.\d+\.\d+", subprocess.check_output([cxx.compiler, "--version"], text=True))
    macros = {
        "R1V2_FAST_ARCHITECTURES": " ".join(cuda.architectures) if cuda else "",
        "R1V2_FAST_NVCC": cuda.version if cuda else "",
        "R1V2_FAST_COMPILER": f"{Path(cxx.compiler).name} {release[0] if release else ''}".strip(),
    }
    flags = [f"-isystem {shlex.quote(folder)}" for folder in (python, pybind11.get_include())]
    python_flags = " ".join([*flags, *(f"""-D{name}='"{value}"'""" for name, value in macros.items())])
    compiler = shlex.quote(cxx.compiler)
    # a tool that was renewed in its place makes everything anew
    tools = re.sub(r"\W", "_", f"{macros['R1V2_FAST_COMPILER']} {macros['R1V2_FAST_NVCC']}")
    common = f"{COMMON} -DR1V2_FAST_BUILT_BY_{tools}"
    rules = {}
    if cuda:  # nvcc drives it all: it knows where its headers and the static cudart lie
        nvcc = f"{shlex.quote(cuda.nvcc)} -ccbin {compiler}"
        asked = "".join(f" -Xcompiler {flag}" for flag in cxx.flags)
        rules["cpp"] = f"{cxx.launcher}{nvcc} {common} -DR1V2_FAST_CUDA -Xcompiler={','.join(HOST)}{asked}"
        rules["cu"] = f"{rules['cpp']} {DEVICE} --threads 0 {gencode(cuda.architectures)}"
        link = f"{nvcc} -shared -cudart static --no-device-link -Xcompiler={','.join(LINK)}{asked}"
        link += f" -Xlinker={','.join(LINKER)}"
        beside = Path(cuda.nvcc).parent.parent / "lib"  # where PyPI's toolkit has what others have in lib64
        if (beside / "libcudart_static.a").is_file():
            link += f" -L{shlex.quote(str(beside))}"
    else:
        rules["cpp"] = f"{cxx.launcher}{compiler} {common} {' '.join([*HOST, *cxx.flags])}"
        link = f"{compiler} -shared {' '.join([*LINK, *cxx.flags])} -Wl,{','.join(LINKER)}"
    lines = ["ninja_required_version = 1.5"]
    for rule, command in rules.items():
        lines += [
            f"rule {rule}",
            f"  command = {command} $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
        ]
    lines += ["rule link", f"  command = {link} $in -o $out", "  description = link $out"]
    objects = []
    for source in sorted([*ROOT.glob("csrc/*.cpp"), *(ROOT.glob("csrc/*.cu") if cuda else ())]):
        binding = is_binding(source)
        objects.append(f"{source.name}.{library.stem}.o" if binding else f"{source.name}.o")
        lines.append(f"build {objects[-1]}: {source.suffix[1:]} {CSRC}/{source.name}")
        lines.append(f"  flags = {python_flags if binding else extra_flags(source)}")
    lines.append(f"build {library.name}: link {' '.join(objects)} | {CSRC}/exports.map")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    extension = Extension("r1v2_fast._C", sources=[], optional=True)
    setup(ext_modules=[extension], cmdclass={"build": Build, "build_ext": NinjaBuild})
