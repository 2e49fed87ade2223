"""Executes the text of csrc/kernels/cuda/*.cu on the CPU and finds its races; see README.md."""
