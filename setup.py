# SPDX-License-Identifier: Apache-2.0
"""Thin driver of CMake: decides which native libraries exist and packages them.

SIDECHAIN_NATIVE=0 installs pure Python; SIDECHAIN_CUDA=auto|0|1 (auto: nvcc on PATH).
Build with `pip install --no-build-isolation` so that the torch of the environment is linked.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def extensions() -> list[Extension]:
    if os.environ.get("SIDECHAIN_NATIVE", "1") == "0":
        return []
    cuda = os.environ.get("SIDECHAIN_CUDA", "auto")
    if cuda not in ("auto", "0", "1"):
        sys.exit(f"setup.py: expected SIDECHAIN_CUDA to be auto, 0 or 1, got {cuda!r}")
    nvcc = shutil.which("nvcc")
    if cuda == "1" and nvcc is None:
        sys.exit("setup.py: expected nvcc on PATH with SIDECHAIN_CUDA=1, got none")
    names = ["_C"]
    if cuda != "0" and nvcc is not None:
        names.append("_C_cuda")
    found = [Extension(f"sidechain.{n}", [], py_limited_api=True) for n in names]
    if Path(sysconfig.get_path("include"), "Python.h").exists():
        found.append(Extension("sidechain._host", []))
    else:
        print("setup.py: Python.h not found (apt package python3-dev): _host is not built")
    return found


class CMakeBuild(build_ext):
    def run(self) -> None:
        import torch

        self.cmake = shutil.which("cmake") or sys.exit("setup.py: expected cmake (pip wheel cmake)")
        self.folder = Path(os.environ.get("SIDECHAIN_BUILD_DIR", ROOT / "build" / "cmake"))
        names = {e.name.split(".")[-1] for e in self.extensions}
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "SIDECHAIN_TORCH_ROOT": Path(torch.__file__).parent,
            "SIDECHAIN_CUDA": int("_C_cuda" in names),
            "SIDECHAIN_HOST": int("_host" in names),
            "Python_EXECUTABLE": sys.executable,
        }
        if "_host" in names:
            import pybind11

            options["pybind11_DIR"] = pybind11.get_cmake_dir()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        defines = [f"-D{key}={value}" for key, value in options.items()]
        self.call("-S", ROOT, "-B", self.folder, *generator, *defines)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = ext.name.split(".")[-1]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        self.call("--build", self.folder, "--target", target, "--parallel", jobs)
        (built,) = self.folder.glob(f"{target}.*so")
        place = Path(self.get_ext_fullpath(ext.name))
        place.parent.mkdir(parents=True, exist_ok=True)
        # A running process may hold the old file: replace it, never write into it.
        fresh = place.with_suffix(".new")
        shutil.copyfile(built, fresh)
        os.replace(fresh, place)

    def call(self, *args: object) -> None:
        subprocess.run([self.cmake, *map(str, args)], check=True)


packages = find_packages("python", include=["sidechain", "sidechain.*"])
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": CMakeBuild},
    packages=[*packages, "sidechain.triton_kernels"],
    package_dir={"": "python", "sidechain.triton_kernels": "triton_kernels"},
    package_data={
        "sidechain": ["py.typed", "*.pyi", "zoo/weights/**", "report/templates/*", "data/**/*.json"]
    },
)
