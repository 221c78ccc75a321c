"""Devices: GPUs and RAM, measured without touching CUDA."""
