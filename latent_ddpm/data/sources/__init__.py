"""Where images come from: a folder, a Hub dataset, embedded digits, or a stream."""
