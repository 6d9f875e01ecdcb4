"""Maps ``kernels/`` to ``fused_preact.kernels`` and builds the CPU kernels where a compiler and torch are there.

Everything else is in pyproject.toml. ``FUSED_PREACT_BUILD_EXT``: "auto" (the default) builds the kernels if it
can, "1" fails where it cannot, "0" does not try. Without them the package is pure Python and plain PyTorch
serves on the CPU; an install in build isolation has no torch at build time and is such an install.
"""

import os
import runpy
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

BUILD = os.environ.get("FUSED_PREACT_BUILD_EXT", "auto")
if BUILD not in ("0", "1", "auto"):
    raise SystemExit(f"FUSED_PREACT_BUILD_EXT: got {BUILD!r}, allowed are '0', '1' and 'auto'")


def _warn(reason):
    print(f"warning: fused_preact is installed without compiled CPU kernels: {reason}", file=sys.stderr)


def _missing():
    """Why the kernels cannot be built here, or None."""
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return "torch cannot be imported at build time (pip install --no-build-isolation lets it)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    if sys.platform != "linux":
        return f"they are written for Linux, not {sys.platform}"
    return None


def _extension():
    """The ext_modules and command classes that build the kernels."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = runpy.run_path("kernels/sources.py")

    class BuildKernels(BuildExtension):
        """Builds the kernels and, beside them, the record of their sources, which fused_preact.library reads.

        Unless they were demanded, a failure leaves a pure-Python package.
        """

        def __init__(self, *args, **kwargs):
            # A library of operators, no Python module: its name carries no Python ABI.
            kwargs["no_python_abi_suffix"] = True
            super().__init__(*args, **kwargs)

        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if BUILD == "1":
                    raise
                _warn(f"the build failed ({' '.join(str(error).split())[:200]})")
                # What an earlier build left would be packed in the place of this one.
                for ext in self.extensions:
                    for leftover in self._built(ext):
                        leftover.unlink(missing_ok=True)
                self.extensions = self.distribution.ext_modules = []

        def _built(self, ext):
            """The library in the build tree, and its record."""
            library = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
            return library, library.with_name(sources["RECORD"])

        def _records(self):
            """Each record in the build tree, and where a build in place has it."""
            build_py = self.get_finalized_command("build_py")
            for ext in self.extensions:
                folder = build_py.get_package_dir(ext.name.rpartition(".")[0])
                yield str(self._built(ext)[1]), str(Path(folder, sources["RECORD"]))

        def build_extension(self, ext):
            # Taken before: what is edited while the compiler runs may or may not be in the library.
            digest = sources["digest"]()
            _, record = self._built(ext)
            record.unlink(missing_ok=True)
            super().build_extension(ext)
            record.write_text(f"{digest}\n")

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            for record, in_tree in self._records():
                shutil.copyfile(record, in_tree)

        # What a strict editable install links.
        def get_outputs(self):
            return sorted({*super().get_outputs(), *dict(self._records())})

        def get_output_mapping(self):
            return super().get_output_mapping() | (dict(self._records()) if self.inplace else {})

    class Wheel(bdist_wheel):
        """A wheel whose kernels failed to build is pure Python and says so in its name."""

        def run(self):
            self.run_command("build")
            self.root_is_pure = not self.distribution.has_ext_modules()
            # The installation into the wheel would compile everything again.
            self.skip_build = True
            super().run()

    extension = CppExtension(
        "fused_preact.kernels._cpu",
        sorted(glob("kernels/cpu/*.cpp")),
        depends=sorted(glob("kernels/cpu/*.h")),
        # -fopenmp for the compiler alone: at::parallel_for runs on the OpenMP runtime that torch brings, and
        # linking another one would mean a second pool of threads.
        extra_compile_args=["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"],
    )
    extension.libraries = ["c10", "torch_cpu"]
    return [extension], {"build_ext": BuildKernels, "bdist_wheel": Wheel}


# Computed, never typed: a sub-folder forgotten here imports in an editable install and is
# missing from the wheel.
packages = find_packages(include=["fused_preact", "fused_preact.*"])
packages += ["fused_preact.kernels"]
packages += [f"fused_preact.kernels.{name}" for name in find_packages("kernels")]

ext_modules, cmdclass = [], {}
if BUILD != "0":
    reason = _missing()
    if reason is None:
        ext_modules, cmdclass = _extension()
    elif BUILD == "1":
        raise SystemExit(f"FUSED_PREACT_BUILD_EXT=1, but {reason}")
    else:
        _warn(reason)

setup(
    packages=packages,
    package_dir={"fused_preact": "fused_preact", "fused_preact.kernels": "kernels"},
    package_data={"fused_preact": ["py.typed"], "fused_preact.kernels": ["triton/tuned/*.json"]},
    include_package_data=False,
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
