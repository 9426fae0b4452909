"""Variants: built artifacts, one file per scheme, each known by the digest of its bytes."""
