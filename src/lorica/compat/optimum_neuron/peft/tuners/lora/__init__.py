"""Optimum Neuron."""
