"""What an embedded Triton needs of this machine: the server of nvidia-pytriton, and a Python for its stubs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from detector.errors import SetupError


@dataclass(frozen=True)
class TritonInstallation:
    """What of Triton was found on this machine.

    Attributes:
        executable: the `tritonserver` binary.
        python_backend: folder of the Python backend.
        stub: the backend's stub for the running Python version.
        library_folders: folders that the dynamic linker must search.
    """

    executable: Path
    python_backend: Path
    stub: Path
    library_folders: tuple[Path, ...]

    def environment(self) -> dict[str, str]:
        """Return the environment that the server needs: ours, and where its libraries and its Python are."""
        environment = dict(os.environ)
        libraries = [str(folder) for folder in self.library_folders]
        if inherited := environment.get("LD_LIBRARY_PATH"):
            libraries.append(inherited)
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
        if not packages_can_use_a_gpu():
            environment["CUDA_VISIBLE_DEVICES"] = ""
        # The stub takes the folders of its Python, and of its virtual environment, from the first `python3` on PATH.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        return environment


def packages_can_use_a_gpu() -> bool:
    """Say whether the models find what they need on a GPU: CuPy, and an onnxruntime with CUDA."""
    if importlib.util.find_spec("cupy") is None:
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def find_triton() -> TritonInstallation:
    """Find the pip-installed Triton and all that its Python backend needs.

    Raises:
        SetupError: names what is missing on this machine and how to get it.
    """
    if sys.platform != "linux":
        raise SetupError(
            f"the embedded Triton: got {sys.platform}, expected Linux; use NVIDIA's Triton container image here"
        )
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise SetupError("the embedded Triton needs nvidia-pytriton: pip install 'stripwire[embedded]'")
    check_stub_python()
    package_folder = Path(spec.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    root = package_folder / "tritonserver"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise SetupError(
            f"the embedded Triton: nvidia-pytriton has no stub for Python {version}; use Python 3.10 to 3.12"
        )
    return TritonInstallation(
        executable=root / "bin" / "tritonserver",
        python_backend=root / "backends" / "python",
        stub=stub,
        library_folders=(package_folder.parent / "nvidia_pytriton.libs", find_libpython(version).parent),
    )


_PROBE = """
from importlib.util import find_spec
import json, numpy, sys
missing = [name for name in ("detector", "onnxruntime") if find_spec(name) is None]
print(json.dumps({"python": "%d.%d" % sys.version_info[:2], "numpy": numpy.__version__, "missing": missing}))
"""


def check_stub_python() -> None:
    """Check the Python that Triton's stubs will embed: the `python3` beside this one, isolated from its environment.

    Raises:
        SetupError: it lacks a package, is another Python version, or has a NumPy that the stub cannot read.
    """
    python = Path(sys.executable).with_name("python3")
    try:
        answer = subprocess.run(  # noqa: S603  our own interpreter and code
            [python, "-I", "-c", _PROBE], capture_output=True, text=True, check=True, timeout=60
        )
        found = json.loads(answer.stdout)
    except FileNotFoundError:
        raise SetupError(
            f"the embedded Triton: {python} was not found; run Stripwire from a virtual environment"
        ) from None
    except (subprocess.SubprocessError, ValueError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise SetupError(
            f"the embedded Triton: {python} -I cannot import what the models need ({detail.strip().splitlines()[-1]}); "
            "pip install 'stripwire[embedded]' in a virtual environment"
        ) from error
    check_stub_packages(found["python"], found["numpy"], found["missing"])


def check_stub_packages(python: str, numpy: str, missing: list[str]) -> None:
    """Raise SetupError unless what `check_stub_python` found can run the models."""
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python != running:
        raise SetupError(
            f"the embedded Triton: the python3 beside {sys.executable} is {python}, expected {running}; run Stripwire "
            "from a virtual environment"
        )
    if missing:
        raise SetupError(
            f"the embedded Triton: its Python cannot import {', '.join(missing)}; pip install 'stripwire[embedded]' in "
            "a virtual environment (a user or --target installation is not seen there)"
        )
    if int(numpy.split(".", maxsplit=1)[0]) >= 2:
        raise SetupError(
            f"the embedded Triton: got NumPy {numpy}, expected 1.26 (with 2.x its Python backend returns empty tensors "
            "without an error); pip install 'numpy<2'"
        )


def find_libpython(version: str, folders: tuple[str | None, ...] | None = None) -> Path:
    """Return the shared library of Python `version` (`3.11`), which the stub links.

    Args:
        version: major and minor version.
        folders: where to look; by default where this Python and the system keep libraries.

    Raises:
        SetupError: there is none.
    """
    if folders is None:
        multiarch = sysconfig.get_config_var("MULTIARCH")
        folders = (
            sysconfig.get_config_var("LIBDIR"),
            str(Path(sys.base_prefix) / "lib"),
            f"/usr/lib/{multiarch}" if multiarch else None,
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib64",
            "/usr/lib",
        )
    name = f"libpython{version}.so.1.0"
    for folder in folders:
        if folder and (path := Path(folder) / name).exists():
            return path
    raise SetupError(
        f"the embedded Triton: {name} was not found, and its Python backend links it; install it (Debian, Ubuntu: "
        f"apt-get install libpython{version}) or use a Python that was built with --enable-shared"
    )
