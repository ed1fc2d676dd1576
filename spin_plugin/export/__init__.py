"""A finished iteration as a model ready to serve."""
