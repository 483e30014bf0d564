"""What a training step does between its matrix products, each in one pass over memory, compiled where g++ is."""
