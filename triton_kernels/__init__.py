"""Triton kernels, one family a module. They import nothing of pyeff, and triton only when one of them is imported."""
