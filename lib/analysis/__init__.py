"""Analysis: pictures of losses, masks and layouts."""
