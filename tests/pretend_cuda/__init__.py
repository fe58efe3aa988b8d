"""CUDA code paths without a GPU: tensors that say they are on cuda:0, hold CPU data, and refuse to mix with CPU ones.

Needs a CUDA build of torch, and runs megatron-core as it is. Kernels are the CPU's: results say nothing of CUDA's
kernels, only of the Python around them, of where tensors are, and of when the host waits for the device.
"""
