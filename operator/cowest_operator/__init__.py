"""The control plane: manifest and world in, plan out."""
