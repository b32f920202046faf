"""Training with rounding: what the engine does otherwise when a model is prepared to be trained on."""
