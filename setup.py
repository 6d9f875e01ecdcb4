"""Maps the top-level ``kernels/`` folder to ``fused_preact.kernels``; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

# Computed, never typed: a sub-folder forgotten here imports in an editable install and is
# missing from the wheel.
packages = find_packages(include=["fused_preact", "fused_preact.*"])
packages += ["fused_preact.kernels"]
packages += [f"fused_preact.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=packages,
    package_dir={"fused_preact": "fused_preact", "fused_preact.kernels": "kernels"},
    package_data={"fused_preact": ["py.typed"], "fused_preact.kernels": ["triton/tuned/*.json"]},
    include_package_data=False,
)
