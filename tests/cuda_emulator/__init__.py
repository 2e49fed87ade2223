"""Executes the text of csrc/cuda/*.cu on the CPU and finds its races; see README.md."""
