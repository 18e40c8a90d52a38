"""Analysis: pictures of losses, masks and layouts; the machine schedule of TPU kernels."""
