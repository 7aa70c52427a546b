"""A stand-in for pip that installs nothing and writes down what it was asked for."""
