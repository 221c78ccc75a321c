"""Devices: GPUs and RAM, measured without CUDA."""
