"""Records, images, collation, and the digits dataset."""
