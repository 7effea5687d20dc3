"""What the vendors' compilers say of a kernel, on a machine without the accelerator: `python -m`."""
