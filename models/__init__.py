"""Models: Linen modules that are thin shells over the pure functions of the library."""
