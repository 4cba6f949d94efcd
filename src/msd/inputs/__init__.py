"""From what a user shows and says to processor output."""
