"""The machine: where torch's libraries are, whether they fit, and what the result says of the hardware."""

import datetime
import gzip
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

# What the binaries are linked against; another release has other symbols.
TORCH_SERIES = "2.11."


def has_module(name):
    return importlib.util.find_spec(name) is not None


def torch_folder():
    """Of the module, without importing it: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_version():
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def unpack(bundle):
    """Programs as they were before the bundle was packed."""
    for packed in (bundle / "bin").glob("*.gz"):
        program = packed.with_suffix("")
        with gzip.open(packed) as source, open(program, "wb") as target:
            shutil.copyfileobj(source, target)
        program.chmod(0o755)
        packed.unlink()


def problem(bundle):
    """Why the binaries cannot run here, in one sentence."""
    python, folder, version = sys.executable, torch_folder(), torch_version()
    if folder is None or version is None:
        return f"{python} has no torch: start run.py with the Python that has torch {TORCH_SERIES}x"
    if not version.startswith(TORCH_SERIES):
        return f"torch is {version}, and the binaries are linked against {TORCH_SERIES}x: pip install torch==2.11.0"
    for library in needed_libraries(bundle):
        if not (folder / "lib" / library).exists():
            return f"{folder}/lib has no {library}: this is another build of torch than the bundle was made with"
    machine = json.loads((bundle / "bundle.json").read_text())["machine"]
    if platform.machine() != machine:
        return f"the binaries are for {machine}, and this is {platform.machine()}"
    return loader_problem(bundle, environment(bundle, "cpu"))


def needed_libraries(bundle):
    """Those of libtorch, by the names in the binary."""
    content = (bundle / "bin/aha").read_bytes()
    names = ["libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so", "libtorch.so"]
    return [name for name in names if b"\0" + name.encode() + b"\0" in content]


def loader_problem(bundle, variables):
    started = subprocess.run([bundle / "bin/aha", "--version"], env=variables, capture_output=True, text=True, timeout=120)
    if started.returncode == 0:
        return None
    said = started.stderr.strip()
    missing = re.search(r"version `((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)' not found", said)
    if missing:
        libc = " ".join(platform.libc_ver())
        return f"this system ({libc}) is older than the one that built the bundle: it lacks {missing[1]}. {said}"
    if "undefined symbol" in said:
        return f"torch's libraries lack a symbol, so they are of another version or C++ ABI: {said}"
    return f"aha does not start (exit code {started.returncode}): {said}"


def environment(bundle, device):
    """Variables of every program. The binaries name the libtorch of the machine that built them; this one comes first."""
    folder = torch_folder()
    libraries = [folder / "lib"]
    nvidia = importlib.util.find_spec("nvidia")
    for place in nvidia.submodule_search_locations if nvidia else []:
        libraries += sorted(Path(place).glob("*/lib"))
    before = os.environ.get("LD_LIBRARY_PATH")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join([*map(str, libraries), *([before] if before else [])]),
        "AHA_WORKSPACE": str(bundle / "workspace"),
        "AHA_TEST_DEVICE": device,
    }


def facts(bundle, device):
    made = json.loads((bundle / "bundle.json").read_text())
    now = datetime.datetime.now(datetime.timezone.utc)
    found = {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        **(gpu() if device == "cuda" else {}),
        "processor": processor(),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "torch": torch_version(),
        "transformers": installed("transformers"),
        "aha": f"commit {made['commit']}, built {made['date']}",
    }
    return found


def gpu():
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"GPU": f"unknown ({error})"}
    lines = said.stdout.strip().splitlines()
    if said.returncode != 0 or not lines:
        return {"GPU": f"unknown ({said.stderr.strip() or 'nvidia-smi says nothing'})"}
    name, driver, memory = (part.strip() for part in lines[0].split(","))
    return {"GPU": f"{name}, {memory}", "GPUs of the machine": str(len(lines)), "driver": driver}


def processor():
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def installed(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
