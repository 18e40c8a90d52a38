"""The library: the language (tokens, masks, layouts, positions), the mixers, their parallel forms, decoding and training."""
