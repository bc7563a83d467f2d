"""The parts of a training run: engine, optimizer, loss, guards, checkpoints, monitor."""
