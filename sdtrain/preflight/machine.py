"""Describes this machine and installation: what a bug report needs, and what is slow or missing here."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil

from sdtrain import __version__
from sdtrain.models.device import available_memory_bytes
from sdtrain.models.weights import cache_dir
from sdtrain.precision import choose, default_device
from sdtrain.preflight.checks import in_bytes
from sdtrain.redaction import without_secrets

Facts = dict[str, str]
"""By name, in words."""

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
_PROGRAMS = {
    "c++": "compiles DeepSpeed's operation for training on CPUs and torch.compile's kernels; install a C++ compiler",
    "nvcc": "compiles DeepSpeed's own CUDA kernels, which nothing here needs",
    "initdb": "PostgreSQL, for `make up`",
}
_PLACES = ("/usr/lib/postgresql/*/bin",)  # where Debian keeps what it puts on no PATH
_NOT_FOR_USERS = {"dev"}
_TOLD = re.compile(
    r"(SDTRAIN|HF|HUGGINGFACE|TORCH|PYTORCH|CUDA|NCCL|DS|OMP|MKL|PREFECT|AWS|XDG|TRITON|DUCKDB)_\w+|TMPDIR|HOME|"
    r"(?i:(?:https?|all|no)_proxy)|SSL_CERT_(?:FILE|DIR)|REQUESTS_CA_BUNDLE|LD_PRELOAD|PYTHONPATH"
)
_KEPT_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|AUTH|CREDENTIAL", re.IGNORECASE)


def describe_machine() -> dict[str, Facts]:
    """Returns facts by section; no secret of the environment is among them, and nothing is fetched or left behind."""
    return {
        "versions": _versions(),
        "processor": _processor(),
        "GPUs": _gpus(),
        "memory": _memory(),
        "disk": _disk(),
        "optional components": _components(),
        "programs": {name: _program(name, use) for name, use in _PROGRAMS.items()},
        "caches": _caches(),
        "environment": dict(_environment()),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or the machine's architecture where the system does not tell."""
    return _cpu_line("model name", cpuinfo) or platform.machine()


def _versions() -> Facts:
    of_checkout = commit()
    ours = {"sdtrain": f"{__version__} (commit {of_checkout})" if of_checkout else __version__}
    system = {"Python": platform.python_version(), "system": f"{platform.platform()}, {_distribution()}"}
    needed = [name for name, extra in _requirements() if not extra]
    return ours | system | {name: _version(name) or "missing" for name in needed}


def commit() -> str:
    """Of the checkout that this code is in, with + if files were changed; empty elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
        return said.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unnamed")
    except OSError:
        return "unnamed"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _requirements() -> Iterator[tuple[str, str]]:
    """(distribution, extra that asks for it, or "") for each of our requirements; none where we are not installed."""
    try:
        wanted = requires("sdtrain") or []
    except PackageNotFoundError:
        return
    for text in wanted:
        name, extra = re.match(r"[\w.-]+", text), re.search(r"extra == [\"']([\w-]+)", text)
        if name:
            yield name[0], extra[1] if extra else ""


def _processor() -> Facts:
    import torch

    flags = set((_cpu_line("flags") or _cpu_line("Features")).split())
    allowed = len(os.sched_getaffinity(0))
    chosen = choose("cpu")
    return {
        "model": cpu_model(),
        "cores": f"{allowed} of {os.cpu_count()} may be used; PyTorch uses {torch.get_num_threads()} threads",
        "units": ", ".join(flag for flag in _CPU_FLAGS if flag in flags) or "none of AVX2, AVX-512, AMX",
        "precision: auto": f"{chosen.precision}: {chosen.reason}",
    }


def _cpu_line(name: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _gpus() -> Facts:
    import torch

    built = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        return {"none": f"PyTorch is built for CUDA {built} and finds no GPU" if built else "PyTorch is built without"}
    found = {"CUDA": f"{built}, cuDNN {torch.backends.cudnn.version()}, driver {_driver()}"}
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        memory, capability = in_bytes(gpu.total_memory), f"{gpu.major}.{gpu.minor}"
        found[str(number)] = f"{gpu.name}, {memory}, compute capability {capability}"
    chosen = choose(default_device())
    return found | {"precision: auto": f"{chosen.precision}: {chosen.reason}"}


def _driver() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        told = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        return f"unknown ({error})"
    return told if isinstance(told, str) else told.decode()


def _memory() -> Facts:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    facts = {
        "RAM": f"{in_bytes(psutil.virtual_memory().total)}, of which this process may take "
        f"{in_bytes(available_memory_bytes())} now",
        "open files": f"at most {soft:,}, and {hard:,} on request",
    }
    shared = Path("/dev/shm")  # noqa: S108  # only looked at: PyTorch's workers and NCCL need it
    return facts | ({str(shared): _free(shared)} if shared.exists() else {})


def _disk() -> Facts:
    folders = {"current folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    return {name: f"{folder}: {_free(folder)}" for name, folder in folders.items()}


def _free(folder: Path) -> str:
    usage = shutil.disk_usage(folder)
    return f"{in_bytes(usage.free)} free of {in_bytes(usage.total)}"


def _components() -> Facts:
    """By extra: the versions of its packages, or the command that installs it."""
    packages: dict[str, list[str]] = defaultdict(list)
    for name, extra in _requirements():
        if extra and extra not in _NOT_FOR_USERS:
            packages[extra].append(name)
    return {extra: _component(extra, names) for extra, names in sorted(packages.items())}


def _component(extra: str, names: list[str]) -> str:
    found = {name: _version(name) for name in names}
    here = ", ".join(f"{name} {told}" for name, told in found.items() if told)
    missing = ", ".join(name for name, told in found.items() if not told)
    if not missing:
        return here
    return f"{f'{here}; ' if here else ''}missing {missing}: pip install 'sdtrain[{extra}]'"


def _program(name: str, use: str) -> str:
    elsewhere = [str(folder) for pattern in _PLACES for folder in Path("/").glob(pattern[1:])]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *elsewhere])) or f"missing: {use}"


def _caches() -> Facts:
    from huggingface_hub.constants import HF_HUB_CACHE

    from sdtrain.dataset.s3.url import work_parent

    return {
        "weights": _cache(cache_dir, "SDTRAIN_CACHE"),
        "hub": _cache(lambda: Path(HF_HUB_CACHE), "HF_HOME"),
        "datasets on S3": _cache(work_parent, "SDTRAIN_WORK_DIR"),
    }


def _cache(folder_of: Callable[[], Path], variable: str) -> str:
    try:
        folder = folder_of()
    except RuntimeError as error:  # this user has no home
        return f"{error} Set HOME, or {variable}."
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return f"{folder} cannot be written: set {variable}"
    return f"{folder}{'' if folder.exists() else ' (not there yet)'}: {_free(place)}"


def _environment() -> Iterator[tuple[str, str]]:
    for name, value in sorted(os.environ.items()):
        if _TOLD.fullmatch(name):
            yield name, "is set" if _KEPT_SECRET.search(name) else without_secrets(value)
