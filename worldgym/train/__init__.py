"""Fitting a world to recorded episodes."""
