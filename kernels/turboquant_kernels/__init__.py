"""Fast kernels and their plain-torch references, one folder an operation; imports no other room."""
