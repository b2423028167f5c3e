"""What tests of several files need: our C++ and, emulated, CUDA sources compiled, and a shipped recipe made small."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "tests" / "native_checks", ROOT / "csrc")
# The bits of the race are part of what is tested: contraction would change them
COMMON = ["-std=c++17", "-fPIC", "-Wall", "-ffp-contract=off", "-fno-trapping-math", "-fno-strict-aliasing", "-pthread"]
SANITIZED = ["-O1", "-g", "-fno-sanitize-recover=undefined", "-DR1V2_FAST_NO_CLONES"]  # ifuncs run before sanitizers do
EMULATED = ["-DR1V2_FAST_EMULATED", "-include", "emulated_cuda.h"]


@pytest.fixture
def small_architecture():
    """An override that leaves a layer of each tower to a recipe with dummy weights."""
    return (
        "model.architecture={image_token_id: 510, image_seq_length: 4, text_config: {num_hidden_layers: 1, hidden_size: 64, "
        "intermediate_size: 96, num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 512, eos_token_id: 400}, "
        "vision_config: {num_hidden_layers: 1, hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, "
        "image_size: [56, 56]}}"
    )


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """compiled(*sources, sanitize="address,undefined" | "thread" | "", emulated=False, shared=False): the file's path."""

    def compile_(*sources: str, sanitize: str = "", emulated: bool = False, shared: bool = False) -> Path:
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        out = tmp_path_factory.mktemp("native") / ("library.so" if shared else "program")
        flags = [*COMMON, *(f"-I{folder}" for folder in FOLDERS), *(EMULATED if emulated else [])]
        flags += [*SANITIZED, f"-fsanitize={sanitize}"] if sanitize else ["-O2"]
        paths = [next(folder / name for folder in FOLDERS if (folder / name).is_file()) for name in sources]
        command = ["g++", *flags, *(["-shared"] if shared else []), "-x", "c++", *paths, "-o", out]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return out

    return compile_
