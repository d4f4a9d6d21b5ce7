"""TurboQuant (arXiv:2504.19874): quantizers, their exact laws, and what they are compared with."""
