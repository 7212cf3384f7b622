"""How the embedded model is made; no part of the package."""
