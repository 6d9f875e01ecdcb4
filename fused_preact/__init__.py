"""Pre-activation residual networks with BN, ReLU and the identity addition fused into the convolutions."""
__version__ = "0.1.0"
