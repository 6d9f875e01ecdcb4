"""The Triton backend: the operations of ``fused_preact.reference`` for float32, bfloat16 and float16.

One kernel a file with its launcher below it. ``choose`` says for each convolution whether it runs fused or split and
with which configuration: from tuned ``tables``, else by the heuristic of ``configs``. Importing this package
imports Triton; ``TRITON_INTERPRET=1``, set before, runs the kernels on CPU tensors in Triton's interpreter.
"""

from .bn_backward_apply import bn_backward_apply
from .bn_relu_avg_pool import bn_relu_avg_pool, bn_relu_avg_pool_apply, bn_relu_avg_pool_reduce
from .bn_stats import bn_scale_shift, bn_stats
from .bn_update_running import bn_update_running
from .conv_backward import conv_backward
from .conv_dgrad import conv_dgrad
from .conv_fprop import conv_fprop, conv_fprop_bn
from .conv_wgrad import conv_wgrad
from .tape import replayed

__all__ = [
    "bn_backward_apply",
    "bn_relu_avg_pool",
    "bn_relu_avg_pool_apply",
    "bn_relu_avg_pool_reduce",
    "bn_scale_shift",
    "bn_stats",
    "bn_update_running",
    "conv_backward",
    "conv_dgrad",
    "conv_fprop",
    "conv_fprop_bn",
    "conv_wgrad",
    "replayed",
]
