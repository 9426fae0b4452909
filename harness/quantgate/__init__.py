"""quantgate decides whether a quantized model may replace the one that is serving now."""

__version__ = "0.1.0"
