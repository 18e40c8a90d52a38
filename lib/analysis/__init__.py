"""Analysis: pictures of losses, masks and layouts; fidelity of associative memories; the machine schedule of TPU kernels."""
