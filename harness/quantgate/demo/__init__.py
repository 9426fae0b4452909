"""The embedded demo model: its language, its trainer, and the golden sets that judge it."""
