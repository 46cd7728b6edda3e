"""Recorded episodes: store, chunks, start states, Minari."""
