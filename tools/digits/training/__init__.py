"""How the digits model was trained."""
