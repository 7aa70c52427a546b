"""A stand-in for the package that only Colab has: secrets and the machine's release, as a test sets them."""
