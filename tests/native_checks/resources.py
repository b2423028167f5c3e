"""What every CUDA kernel takes on every architecture, as ptxas counts it, against the committed table.

python tests/native_checks/resources.py            compile all; 1 where a kernel spills or differs from the table
python tests/native_checks/resources.py --write    compile all; write native_resources.json where none spills
"""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "native_resources.json"
FUNCTION = re.compile(
    r"Function properties for (?P<name>\S+)\n\s*"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:\n.*?Used (?P<registers>\d+) registers(?P<more>.*))?"  # a function that is called, not launched, has no line
)


def used(build: dict, nvcc: str, source: Path, architecture: str) -> dict[str, dict[str, int]]:
    """Registers, spilled bytes, stack and static shared memory of every kernel in `source`, compiled as setup.py does."""
    command = [nvcc, *build["COMMON"].split(), *build["DEVICE"].split(), *build["extra_flags"](source).split()]
    command += ["-DR1V2_FAST_CUDA", f"-Xcompiler={','.join(build['HOST'])}", "-cubin", f"-arch=sm_{architecture}"]
    with tempfile.TemporaryDirectory() as folder:
        command += ["-Xptxas", "-v", source, "-o", Path(folder) / "kernels.cubin"]
        said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if said.returncode:
        raise SystemExit(f"{source.name} for sm_{architecture} does not compile:\n{said.stdout}")
    plain = subprocess.run(["c++filt"], input=said.stdout, capture_output=True, text=True, check=True).stdout
    names = [readable(line.partition(" for ")[2]) for line in plain.splitlines() if "Function properties for" in line]
    matches = list(FUNCTION.finditer(said.stdout))
    if not names or len(matches) != len(names) or len(set(names)) != len(names):
        raise SystemExit(
            f"{source.name} for sm_{architecture}: can't tell its kernels apart in what ptxas says:\n{plain}"
        )
    return {name: numbers(match) for name, match in sorted(zip(names, matches, strict=True), key=lambda pair: pair[0])}


def readable(name: str) -> str:
    """Without the namespaces and parameters that every kernel has."""
    return re.sub(r"r1v2_fast::|\(anonymous namespace\)::|^void ", "", name).partition("(")[0]


def numbers(match: re.Match) -> dict[str, int]:
    shared = re.search(r"(\d+) bytes smem", match["more"] or "")
    return {
        "registers": int(match["registers"] or 0),
        "spilled": int(match["stores"]) + int(match["loads"]),
        "stack": int(match["stack"]),
        "shared": int(shared[1]) if shared else 0,
    }


def measure(build: dict, nvcc: str) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """By file, architecture and kernel."""
    tasks = [(source, name) for source in sorted(ROOT.glob("csrc/*.cu")) for name in build["ARCHITECTURES"]]
    table: dict = {source.stem: {} for source, _ in tasks}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, name), found in zip(tasks, pool.map(lambda task: used(build, nvcc, *task), tasks), strict=True):
            table[source.stem][name] = found
    return table


def rows(table: dict) -> dict[str, dict[str, int]]:
    return {
        f"{stem} sm_{arch} {kernel}": found
        for stem, by_arch in table.items()
        for arch, by_kernel in by_arch.items()
        for kernel, found in by_kernel.items()
    }


def complaints(version: str, found: dict, recorded: dict) -> list[str]:
    """Another nvcc allocates otherwise: then the kernels must be the table's, their registers need not."""
    version_recorded, recorded = recorded["nvcc"], rows({k: v for k, v in recorded.items() if k != "nvcc"})
    found = rows(found)
    lines = [f"{row}: in the table, not in csrc" for row in recorded.keys() - found.keys()]
    for row, taken in found.items():
        if row not in recorded:
            lines.append(f"{row}: {taken}, not in the table")
        elif version == version_recorded and taken != recorded[row]:
            lines.append(f"{row}: expected {recorded[row]}, got {taken}")
    if version != version_recorded:
        print(f"nvcc {version} is not the table's {version_recorded}: registers, stack and shared memory not compared")
    return sorted(lines)


def main(arguments: list[str]) -> int:
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="build")
    nvcc, version = build["find_nvcc"]()
    found = measure(build, nvcc)
    spills = [f"{row}: spills, {taken}" for row, taken in rows(found).items() if taken["spilled"]]
    if spills:
        print(*spills, sep="\n")
        return 1
    if arguments == ["--write"]:
        text = json.dumps({"nvcc": version, **found}, indent=1)
        one_line = re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)
        TABLE.write_text(one_line + "\n")
        return 0
    wrong = complaints(version, found, json.loads(TABLE.read_text()))
    if wrong:
        print(*wrong, "`python tests/native_checks/resources.py --write` renews the table", sep="\n")
        return 1
    print(f"{len(rows(found))} kernels by architecture, none spills")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
