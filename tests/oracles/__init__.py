"""The truths: dense, float64, numpy, one line an equation. Slow on purpose and nothing but obvious."""
