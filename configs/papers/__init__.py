"""One file per published system: what it is here, and the experiment that trains it where it is a language model."""
