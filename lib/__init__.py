"""The library: the language, the mixers, their parallel forms, decoding, training and the command line."""
