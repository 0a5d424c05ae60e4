"""JanusFlow in JAX: one model that reads pictures and paints them."""
