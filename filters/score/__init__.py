"""What networks and measurements say of each image: the stage SCORE."""
