"""What a run would train on: one look at every image, duplicates, and a line for each thing its owner wants to know."""
