"""Derive domains, costs, bounds and gradients of a program symbolically."""
