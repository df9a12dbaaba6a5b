"""dynrec_jax: sequential recommenders whose picture of a user moves as the user's interests move."""

__version__ = "0.1.0"
