"""Converting the weights of a directory: what is done together, by whom, and how it goes on after it was killed."""
