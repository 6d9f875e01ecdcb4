"""Measure which path and which launch configuration serves each convolution of a network best on this device.

    python -m fused_preact.tune --model preact_resnet50 --batch 256 --dtype bf16

For every convolution of a training step: the configurations that the cost model ranks first, the split path and eager
PyTorch; every one is compared with float64 before it is timed, all are timed in turns, and what won is written to the
user's table at once, so that an interrupted run goes on where it stopped. Nothing of this happens in a training run.

``problems`` enumerates, ``trial`` makes inputs and checks, ``compiling`` reads compiled code, ``timing`` times,
``loop`` puts them together, ``cli`` is the command.
"""
