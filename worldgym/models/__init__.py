"""Models: choices of codec, dynamics, controls, memory and heads."""
