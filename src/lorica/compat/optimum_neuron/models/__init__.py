"""optimum.neuron.models: what surrounds training."""
