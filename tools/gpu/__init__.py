"""What a GPU has to say about this project, in one command that ends in time: `python -m tools.gpu`."""
