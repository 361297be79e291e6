"""The heads, the losses and the fused kernels."""
