"""Analysis: pictures of losses, masks and layouts; associative memories; the machine schedule of TPU kernels."""
