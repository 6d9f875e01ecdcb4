"""Measurements of fused_preact: ``python -m benchmarks``."""
