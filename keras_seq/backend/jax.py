"""JAX kernels."""

from jax.lax import scan as scan
