"""The artifact audit: stored weights, dequantized by independent code, against the source's."""
