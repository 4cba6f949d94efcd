"""What the image tells of each answer token, and the labels that follow."""
