"""Labels the tokens of an answer with modalities, by how much the image or the events influence each token."""
