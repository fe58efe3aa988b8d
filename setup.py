"""Builds the fused kernels where a compiler is found; all metadata is in pyproject.toml.

GSPO_MOE_CUDA=auto|0|1: CUDA kernels where nvcc is found (a GPU is not needed), never, or as a must.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

KERNELS = Path("gspo_moe/kernels")


def kernels():
    """Arguments of `setup` that build the extension; none where it cannot be built, and why is printed."""
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError:
        return _without("torch is not installed where this builds; use pip install --no-build-isolation")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return _without(f"there is no C++ compiler {compiler}; install g++, or name one with CXX")
    build = _build_module()
    # setuptools wants sources relative to this file.
    sources = [KERNELS / "csrc/ops.cpp", *sorted((KERNELS / "csrc/cpu").glob("*.cpp"))]
    extension = CppExtension(
        "gspo_moe.kernels._C",
        [str(source) for source in sources],
        define_macros=[("GSPO_MOE_SOURCES", build.library_fingerprint())],
        extra_compile_args=list(build.CPU_FLAGS),
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": _build_command(build)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def _build_command(build):
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        """Links CUDA objects in, which nvcc makes apart: torch's CUDAExtension wants a CUDA build of torch."""

        def build_extensions(self):
            self.force = True  # times of change do not tell which sources a library is made of
            objects = build.cuda_objects(Path(self.build_temp) / "cuda")
            if objects:
                (extension,) = self.extensions
                extension.extra_objects += objects
                extension.extra_link_args += build.cuda_link_arguments()
                extension.define_macros.append(("GSPO_MOE_WITH_CUDA", None))
            super().build_extensions()

    return BuildKernels


def _build_module():
    """gspo_moe/kernels/build.py by its path: importing the package would load the kernels that are yet to be built."""
    specification = importlib.util.spec_from_file_location("gspo_moe_kernels_build", KERNELS / "build.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def _without(reason):
    if os.environ.get("GSPO_MOE_CUDA") == "1":
        sys.exit(f"GSPO_MOE_CUDA=1 asks for the CUDA kernels, but {reason}")
    print(f"gspo_moe: installing without fused kernels: {reason}", file=sys.stderr)
    return {}


setup(**kernels())
