"""What networks and measurements say of each picture: the stage SCORE."""
