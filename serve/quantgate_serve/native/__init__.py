"""Kernels in C for the CPU, compiled where the server first starts."""
