"""CMT (camera + LiDAR transformer detector) with the AQR attention bias, in pure PyTorch 2."""

__version__ = "0.1.0"
