"""How a stream is run: engines turn a model, a strategy and tokens into steps."""
