"""Kernels of fused_preact, installed as ``fused_preact.kernels`` (see ``package_dir`` in setup.py).

This package imports torch and triton only, never ``fused_preact``. Importing it imports neither Triton
nor a device: ``fused_preact.kernels.triton`` is imported by the first operation that needs it.
"""

if __name__ == "kernels":
    # A bare import would load every kernel module a second time under another name: two caches, two
    # copies of each jit function, and no error.
    raise ImportError("import this package as fused_preact.kernels; `kernels` is its folder in the checkout")
