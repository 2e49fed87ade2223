"""Executes the sources csrc/kernels/cuda/*.cu on the CPU and finds their races; see README.md."""
