"""One file per experiment, and the schema that they all fill in."""
